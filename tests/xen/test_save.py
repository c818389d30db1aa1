"""A live save of a domain of real Xen is what ``xl restore`` takes, and the guest goes on from it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from xen_guests import create, destroy, domid_of, load_program, low_memory, saving, wait_for_work, xl

from pageferry.core.errors import MigrationError
from pageferry.core.events import PhaseBegan, RoundEnded
from pageferry.guests.boot import GuestParams
from pageferry.stream.walk import Walk
from pageferry.stream.xl import Inside
from pageferry.xen import uapi

MEMORY_BYTES = 12 << 20
XEN_PYTHON = Path("/usr/lib/xen-4.17")
PARAMS = GuestParams(working_set_bytes=4 << 20)


def verify_stream(path, kind="xl"):
    """Have Xen's own tool verify a file."""
    environment = os.environ | {"PYTHONPATH": str(XEN_PYTHON / "lib/python")}
    program = XEN_PYTHON / "bin/verify-stream-v2"
    done = subprocess.run(
        ["/usr/bin/python3", program, "-i", path, "-f", kind],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr


@contextlib.contextmanager
def as_its_driver(control, store, domid):
    """Be the driver that the guest lacks: when it is asked to suspend, it does."""
    over, path = threading.Event(), f"/local/domain/{domid}/control/shutdown"

    def watch():
        while not over.wait(0.005):
            if store.read(path) == "suspend":
                store.write(path, "")
                control.suspend(domid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def working(control, domain_name, tmp_path):
    """A domain with a guest at work that checks itself: its number, and its memory."""
    domid = create(tmp_path, domain_name, memory_mib=MEMORY_BYTES >> 20)
    memory, _ = load_program(control, domid, "kv", MEMORY_BYTES - (1 << 20), params=PARAMS)
    control.unpause(domid)
    wait_for_work(memory, 100)
    yield domid, memory
    memory.close()


def save(control, store, domid, path, **options):
    domain, attempt = saving(control, store, domid, path, **options)
    try:
        return attempt.run()
    finally:
        domain.close()


def log_dirty_is_off(control, domid):
    """Find out by turning it on."""
    control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
    control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)
    return True


def test_a_live_save_is_restored_by_xl_and_the_guest_goes_on(control, store, domain_name, working, tmp_path):
    domid, memory = working
    at_pause = {}

    def keep(event):  # the domain is suspended, and all pages are written
        if isinstance(event, PhaseBegan) and event.phase == "verify":
            at_pause["memory"] = memory.read(0, MEMORY_BYTES - (1 << 20))

    report = save(control, store, domid, tmp_path / "guest", on_event=keep)
    assert report.status == "completed"
    assert report.verified_pages == control.info(domid).memory_pages
    assert len(report.rounds) > 1
    print(f"downtime {report.downtime_s:.3f} s {report.downtime_parts_s}, total {report.total_s:.1f} s")
    wait_for_work(memory, 100)  # it runs on here
    assert log_dirty_is_off(control, domid)
    verify_stream(tmp_path / "guest")
    destroy(domain_name)
    xl("restore", "-p", tmp_path / "guest")
    restored = low_memory(control, domid_of(domain_name), MEMORY_BYTES - (1 << 20))
    assert restored.read(0, MEMORY_BYTES - (1 << 20)) == at_pause["memory"]
    control.unpause(domid_of(domain_name))
    wait_for_work(restored, 100)
    restored.close()


def test_what_xens_log_missed_is_saved_and_told(control, store, domain_name, working, tmp_path):
    domid, _ = working
    last_page = (MEMORY_BYTES >> 12) - 1  # not of the guest's working set
    outside = low_memory(control, domid, MEMORY_BYTES)

    def write_from_outside(event):
        if isinstance(event, RoundEnded):
            np.frombuffer(outside.mapping.view, np.uint8)[last_page << 12] += 1

    report = save(control, store, domid, tmp_path / "guest", on_event=write_from_outside)
    assert [
        each
        for each in report.warnings
        if f"Xen's log missed 1 page(s), saved at the pause: gfn {last_page:#x}" in each
    ]
    expected = outside.read(last_page << 12, 4096)
    verify_stream(tmp_path / "guest")
    destroy(domain_name)
    xl("restore", "-p", tmp_path / "guest")
    restored = low_memory(control, domid_of(domain_name), MEMORY_BYTES)
    assert restored.read(last_page << 12, 4096) == expected
    restored.close()
    outside.close()


@pytest.mark.parametrize("phase", ["connect", "pre-copy", "pause", "stop-and-copy", "state", "verify", "handoff"])
def test_a_failure_in_any_phase_leaves_the_domain_as_it_was(control, store, working, tmp_path, phase):
    domid, memory = working

    def cancel(event):
        if isinstance(event, PhaseBegan) and event.phase == phase:
            attempt.job.cancel()

    domain, attempt = saving(control, store, domid, tmp_path / "guest", on_event=cancel)
    with pytest.raises(MigrationError):
        attempt.run()
    domain.close()
    assert not (tmp_path / "guest").exists()
    info = control.info(domid)
    assert (info.paused, info.shutdown_reason) == (False, None)
    assert log_dirty_is_off(control, domid)
    wait_for_work(memory, 100)


_KILLED = """
import os, sys
sys.path[:] = {paths!r}
from pathlib import Path
from xen_guests import saving
from pageferry.core.events import PhaseBegan
from pageferry.xen.domctl import Control
from pageferry.xen.store import XenStore

def die(event):
    if isinstance(event, PhaseBegan) and event.phase == {phase!r}:
        os.kill(os.getpid(), 9)

with Control() as control, XenStore() as store:
    domain, attempt = saving(control, store, {domid}, Path({path!r}), on_event=die)
    attempt.run()
"""


@pytest.mark.parametrize("phase", ["connect", "pre-copy", "pause", "stop-and-copy", "state", "verify", "handoff"])
def test_a_kill_in_any_phase_is_undone_by_the_next_start(control, working, tmp_path, phase):
    domid, memory = working
    script = _KILLED.format(paths=sys.path, phase=phase, domid=domid, path=str(tmp_path / "guest"))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "pageferry", "xen", "list", "--json"], capture_output=True, text=True, check=True
    )
    (seen,) = [each for each in json.loads(listed.stdout)["domains"] if each["domid"] == domid]
    assert (seen["log_dirty"], seen["status"]) == (False, "running")
    wait_for_work(memory, 100)
    assert not (tmp_path / "guest").exists()


def test_what_xl_saved_is_read(control, store, working, tmp_path):
    domid, _ = working
    with as_its_driver(control, store, domid):
        began = time.monotonic()
        xl("save", "-c", str(domid), tmp_path / "theirs")
        theirs_s = time.monotonic() - began
    verify_stream(tmp_path / "theirs")
    with (tmp_path / "theirs").open("rb") as file:
        inside = Inside(file.readinto)
        names = {seen.name for seen in Walk(inside)}
        assert inside.finish() == [("END", 0)]
    assert {"PAGE_DATA", "HVM_CONTEXT", "HVM_PARAMS", "TSC_INFO"} <= names
    report = save(control, store, domid, tmp_path / "ours")
    print(f"xl save -c {theirs_s:.2f} s, ours {report.total_s:.2f} s")
