"""Which domains are refused and why; how one is paused, suspended and let go on."""

import errno
import json
from types import SimpleNamespace

import pytest
from fake_xen import FakePrivcmd

from pageferry.core.errors import UnsupportedError, UsageError, VmError, XenError
from pageferry.core.vm import VmStatus
from pageferry.engine.guest import TrackedGuest
from pageferry.xen import domain as module
from pageferry.xen import uapi
from pageferry.xen.domain import (
    XenDomain,
    expect_movable,
    expect_not_shut_down,
    find_domain,
    present_frames,
    read_configuration,
)
from pageferry.xen.domctl import Control
from pageferry.xen.hypercall import Privcmd, expect_dom0
from pageferry.xen.undo_log import open_undo_log, sweep

PVH = json.dumps({"c_info": {"type": "pvh", "name": "guest"}}).encode() + b"\n\0"


class Store:
    def __init__(self):
        self.values = {"/local/domain/5/name": "guest"}
        self.on_write = lambda path, value: None

    def directory(self, path):
        return ["0", "5"]

    def read(self, path):
        return self.values.get(path)

    def write(self, path, value):
        self.values[path] = value
        self.on_write(path, value)


@pytest.fixture
def xen():
    return FakePrivcmd()


@pytest.fixture
def guest(xen, monkeypatch, tmp_path):
    """A domain whose memory is not mapped: there is no kernel to do it here."""
    monkeypatch.setattr(module, "map_foreign", lambda *_, **__: SimpleNamespace(size_bytes=0, gfn_limit=0, close=list))
    monkeypatch.setattr(module, "open_undo_log", lambda control, info: open_undo_log(control, info, tmp_path))
    clock = iter(range(10**6))
    control = Control(xen)
    made = XenDomain(control, Store(), control.info(5), now_s=lambda: next(clock), sleep=lambda s: None)
    made.notes = made._undo_log._steps
    made.undo_logs = tmp_path
    return made


def test_a_domain_is_found_by_name_and_number(xen):
    control = Control(xen)
    assert find_domain(control, Store(), "guest").domid == find_domain(control, Store(), "5").domid == 5
    with pytest.raises(UsageError, match="there is no domain 'other'"):
        find_domain(control, Store(), "other")


@pytest.mark.parametrize(
    ("change", "configuration", "why"),
    [
        ({"hvm": False}, PVH, "domain 5 is a PV guest"),
        ({"dying": True}, PVH, "domain 5 is being destroyed"),
        ({}, b"", "Xen's tools keep no configuration of domain 5"),
        ({}, b"not json", "Xen's tools keep no configuration of domain 5"),
        ({}, PVH.replace(b"pvh", b"hvm"), "domain 5 is of type hvm: its device model's state is not read here"),
        ({}, b'{"c_info": {"type": "pvh"}, "pcidevs": [{}]}', "domain 5 has a passed-through device"),
    ],
)
def test_a_domain_that_cannot_be_moved_is_refused_with_a_reason(xen, change, configuration, why):
    for name, value in change.items():
        setattr(xen, name, value)
    with pytest.raises(UnsupportedError, match=why):
        expect_movable(Control(xen).info(5), configuration)


def test_a_domain_that_has_shut_down_is_refused(xen):
    xen.shutdown_reason = 0
    with pytest.raises(UnsupportedError, match="domain 5 has shut down"):
        expect_not_shut_down(Control(xen).info(5))


def test_domain_0_is_refused(xen):
    with pytest.raises(UnsupportedError, match="domain 0 is this one"):
        expect_movable(Control(xen).info(0), PVH)


def test_a_pvh_domain_can_be_moved(xen):
    expect_movable(Control(xen).info(5), PVH)
    expect_not_shut_down(Control(xen).info(5))


def test_its_configuration_lies_where_xens_tools_keep_it(xen, tmp_path):
    info = Control(xen).info(5)
    assert read_configuration(info, tmp_path) == b""
    (tmp_path / f"userdata-d.5.{info.uuid}.libxl-json").write_bytes(PVH)
    assert read_configuration(info, tmp_path) == PVH


def test_frames_are_looked_for_from_both_ends_until_all_are_found(xen):
    xen.pages, asked = 100_000, []
    control = Control(xen)
    control.present = lambda domid, gfns: asked.append(gfns.start) or [gfns.start in (0, 99328)] * len(gfns)
    xen._getdomaininfo = lambda request, u, before=xen._getdomaininfo: (
        before(request, u),
        setattr(u.getdomaininfo, "tot_pages", 1024 + 672),
    )
    assert present_frames(control, 5).count() == 1024 + 672
    assert asked == [0, 99328]


def test_the_engine_rehearses_the_state_as_xen_has_it(guest, xen):
    TrackedGuest(guest).rehearse_state()
    assert "gethvmcontext" in xen.calls
    assert xen.paused == 0


def test_pauses_nest_and_are_written_down_before_they_are_made(guest, xen):
    guest.freeze()
    guest.freeze()
    assert (xen.paused, guest.notes["paused"]) == (2, 2)
    guest.thaw()
    guest.thaw()
    assert (xen.paused, guest.notes["paused"], guest.status) == (0, 0, VmStatus.RUNNING)
    with pytest.raises(VmError, match="not frozen"):
        guest.thaw()


@pytest.mark.parametrize(
    ("refused", "fails"),
    [
        (("op", uapi.XEN_DOMCTL_SHADOW_OP_OFF), XenDomain.close),
        (uapi.XEN_DOMCTL_resumedomain, XenDomain.thaw),
        (uapi.XEN_DOMCTL_unpausedomain, XenDomain.thaw),
    ],
)
def test_what_xen_refuses_to_undo_is_undone_by_the_next_command(guest, xen, refused, fails):
    guest.suspends = True
    guest.freeze()
    guest.log_dirty.enable()
    xen.refuse[refused] = errno.EIO
    with pytest.raises(XenError):
        fails(guest)
    xen.refuse.clear()
    guest.close()
    assert len(list(guest.undo_logs.iterdir())) == 1
    assert sweep(guest.control, guest.undo_logs) == [5]
    assert (xen.log_dirty, xen.paused, xen.shutdown_reason) == (False, 0, None)


@pytest.mark.parametrize("refused", [uapi.XEN_DOMCTL_pausedomain, "suspend"])
def test_a_domain_that_could_not_be_frozen_leaves_no_undo_log(guest, xen, refused):
    xen.refuse[refused] = errno.EBUSY
    guest.suspends = refused == "suspend"
    with pytest.raises(XenError):
        guest.freeze()
    guest.close()
    assert list(guest.undo_logs.iterdir()) == []


def test_a_guest_without_xens_drivers_is_shut_down_to_suspend(guest, xen):
    guest.suspends = True
    guest.freeze()
    assert (xen.shutdown_reason, xen.paused, guest.end) == (uapi.SHUTDOWN_suspend, 1, None)
    guest.thaw()
    assert (xen.shutdown_reason, xen.paused, guest.notes["suspended"]) == (None, 0, 0)
    assert "setvcpucontext" not in xen.calls


def test_a_suspended_domain_goes_on_with_the_last_thaw_only(guest, xen):
    guest.suspends = True
    guest.freeze()
    guest.suspends = False
    guest.freeze()
    guest.thaw()
    assert (xen.shutdown_reason, xen.paused) == (uapi.SHUTDOWN_suspend, 1)
    guest.thaw()
    assert (xen.shutdown_reason, xen.paused) == (None, 0)


def test_a_guest_with_xens_drivers_suspends_itself_and_is_told_when_that_is_cancelled(guest, xen):
    xen.params[uapi.HVM_PARAM_CALLBACK_IRQ] = 2 << 56 | 0xF3
    xen._getvcpucontext = lambda request, u: None
    xen._setvcpucontext = lambda request, u: answers.append(_rax(u))
    answers = []

    def suspends(path, value):
        assert (path, value) == ("/local/domain/5/control/shutdown", "suspend")
        xen.shutdown_reason = uapi.SHUTDOWN_suspend

    guest.store.on_write, guest.suspends = suspends, True
    guest.freeze()
    guest.thaw()
    assert (answers, guest.notes["asked"]) == ([1], 0)
    assert xen.shutdown_reason is None


def test_a_guest_that_does_not_suspend_runs_on_and_the_store_is_as_before(guest, xen):
    xen.params[uapi.HVM_PARAM_CALLBACK_IRQ] = 1
    guest.suspends = True
    with pytest.raises(VmError, match="did not suspend itself within 60 s"):
        guest.freeze()
    assert (xen.paused, guest.notes["suspended"]) == (0, 0)
    assert guest.store.read("/local/domain/5/control/shutdown") == ""


def test_a_domain_that_moved_stays_as_it_is_whatever_becomes_of_this_process(guest):
    guest.suspends = True
    guest.freeze()
    assert guest.rename("--away") == "guest"
    assert (guest.store.read("/local/domain/5/name"), guest.notes["name"]) == ("guest--away", "guest")
    guest.give_away()
    assert guest.notes["given_away"] == 1
    guest.gone()
    undone = ("given_away", "suspended", "asked", "paused", "name")
    assert [guest.notes[step] for step in undone] == [0, 0, 0, 0, ""]


def test_a_domain_that_is_refused_there_has_its_name_again_before_that_is_noted(guest):
    guest.suspends = True
    guest.freeze()
    name = guest.rename("--away")
    guest.give_away()
    guest.store.on_write = lambda path, value: noted.append((value, guest.notes["name"], guest.notes["given_away"]))
    noted = []
    guest.take_back(name)
    assert noted == [("guest", "guest", 1)]
    assert (guest.notes["name"], guest.notes["given_away"], guest.notes["suspended"]) == ("", 0, 1)


@pytest.mark.parametrize(("reason", "status"), [(0, VmStatus.SHUTDOWN), (3, VmStatus.CRASHED)])
def test_a_domain_that_ended_by_itself_has_an_end(guest, xen, reason, status):
    assert guest.end is None
    xen.shutdown_reason = reason
    assert guest.status is status
    assert guest.end is not None


def test_a_host_without_xen_is_told_so(tmp_path):
    with pytest.raises(UnsupportedError, match=r"does not run on Xen|cannot be opened") as refused:
        Privcmd(tmp_path)
    assert refused.value.hint


def test_a_guest_of_xen_is_no_dom0(tmp_path):
    (tmp_path / "capabilities").write_text("\n")
    with pytest.raises(UnsupportedError, match="this is a guest of Xen, and no dom0"):
        expect_dom0(tmp_path / "capabilities")
    (tmp_path / "capabilities").write_text("control_d\n")
    expect_dom0(tmp_path / "capabilities")


def _rax(u):
    import ctypes

    return ctypes.c_uint64.from_address(u.vcpucontext.ctxt + 600).value
