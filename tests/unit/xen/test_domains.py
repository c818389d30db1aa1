"""The list of domains, and that looking changes nothing."""

import errno
from contextlib import closing

import pytest
from fake_xen import FakePrivcmd

from pageferry.core.errors import XenError
from pageferry.xen import uapi
from pageferry.xen.domains import list_domains
from pageferry.xen.domctl import Control
from pageferry.xen.undo_log import open_undo_log, sweep


class Store:
    def directory(self, path):
        return ["0", "5", "7", "name"]

    def read(self, path):
        return {"/local/domain/5/name": "guest"}.get(path)


@pytest.fixture
def xen():
    return FakePrivcmd()


@pytest.fixture
def listed(xen, tmp_path):
    def do():
        return list_domains(Control(xen), Store(), undo_logs=tmp_path, userdata=tmp_path)[1]

    return do


def test_a_domain_is_listed_with_what_xen_and_its_tools_know(xen, listed, tmp_path):
    info = Control(xen).info(5)
    assert listed().kind == "hvm or pvh"
    (tmp_path / f"userdata-d.5.{info.uuid}.libxl-json").write_bytes(b'{"c_info": {"type": "pvh"}}\n\0')
    seen = listed()
    assert (seen.domid, seen.name, seen.kind, seen.paging, seen.status) == (5, "guest", "pvh", "hap", "running")
    assert (seen.memory_bytes, seen.vcpus, seen.log_dirty) == (200 << 12, 1, False)


@pytest.mark.parametrize("on", [False, True])
def test_whether_log_dirty_is_on_is_found_without_a_change(xen, listed, on):
    xen.log_dirty = on
    assert listed().log_dirty is on
    assert xen.log_dirty is on


def test_a_domain_that_another_works_on_is_left_alone(xen, listed, tmp_path):
    with closing(open_undo_log(Control(xen), Control(xen).info(5), tmp_path)):
        xen.calls.clear()
        seen = listed()
    assert (seen.log_dirty, xen.calls) == (None, [])
    assert "works on domain 5 already" in seen.by


def test_what_a_domain_writes_is_counted_while_log_dirty_is_on(xen, tmp_path):
    def writes():
        assert xen.log_dirty
        xen.dirty = {1, 2, 7}

    found = list_domains(Control(xen), Store(), watch=writes, undo_logs=tmp_path, userdata=tmp_path)
    assert [each.dirty_pages for each in found] == [None, 3]
    assert not xen.log_dirty
    assert list(tmp_path.iterdir()) == []


def test_what_another_watches_is_not_counted(xen, tmp_path):
    xen.log_dirty = True
    found = list_domains(Control(xen), Store(), watch=lambda: None, undo_logs=tmp_path, userdata=tmp_path)
    assert (found[1].dirty_pages, found[1].log_dirty) == (None, True)
    assert xen.log_dirty


def test_a_watch_that_is_ended_leaves_log_dirty_off(xen, tmp_path):
    def ends():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list_domains(Control(xen), Store(), watch=ends, undo_logs=tmp_path, userdata=tmp_path)
    assert not xen.log_dirty
    assert list(tmp_path.iterdir()) == []


def test_a_domain_that_ends_meanwhile_is_no_error(xen, tmp_path):
    def ends():
        xen.refuse[("op", uapi.XEN_DOMCTL_SHADOW_OP_PEEK)] = errno.ESRCH
        xen.refuse[("op", uapi.XEN_DOMCTL_SHADOW_OP_OFF)] = errno.ESRCH

    found = list_domains(Control(xen), Store(), watch=ends, undo_logs=tmp_path, userdata=tmp_path)
    assert found[1].dirty_pages is None


def test_a_log_that_xen_does_not_turn_off_is_turned_off_by_the_next_command(xen, tmp_path):
    xen.refuse[("op", uapi.XEN_DOMCTL_SHADOW_OP_OFF)] = errno.EIO
    with pytest.raises(XenError, match="OFF: EIO"):
        list_domains(Control(xen), Store(), undo_logs=tmp_path, userdata=tmp_path)
    xen.refuse.clear()
    assert xen.log_dirty
    assert sweep(Control(xen), tmp_path) == [5]
    assert not xen.log_dirty


def test_a_refusal_of_xen_is_not_an_answer(xen, listed):
    xen.refuse[("op", uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)] = errno.ENOMEM
    with pytest.raises(Exception, match="ENABLE_LOGDIRTY"):
        listed()
    xen.refuse[("op", uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)] = errno.EBUSY
    with pytest.raises(XenError, match="EBUSY"):
        listed()


@pytest.mark.parametrize(
    ("change", "status"),
    [({"paused": 1}, "paused"), ({"shutdown_reason": 2}, "suspended"), ({"shutdown_reason": 0}, "shut down")],
)
def test_the_state_is_in_words(xen, listed, change, status):
    for name, value in change.items():
        setattr(xen, name, value)
    assert listed().status == status


def test_a_pv_domain_has_no_log_of_this_kind(xen, listed):
    xen.hvm = False
    assert (listed().paging, listed().kind, listed().log_dirty) == ("pv", "pv", None)
