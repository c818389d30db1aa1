"""A live save of a domain of real Xen is what ``xl restore`` takes, and the guest goes on from it."""

import contextlib
import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from xen_guests import (
    MEMORY_BYTES,
    destroy,
    domid_of,
    log_dirty_is_off,
    low_memory,
    pageferry,
    run_cancelled,
    run_killed,
    saving,
    seen,
    wait_for_work,
    xl,
)
from xen_tools import verify_stream

from pageferry.core.events import PhaseBegan, RoundEnded
from pageferry.stream.walk import Walk
from pageferry.stream.xl import Inside

PHASES = ("connect", "pre-copy", "pause", "stop-and-copy", "state", "verify", "handoff")
XEN_TOOLS = Path("/usr/lib/xen-4.17")


def expect_accepted(path):
    """Have Xen's own tool verify a file."""
    assert verify_stream(XEN_TOOLS, path, "xl") == ""


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


def save(control, store, domid, path, **options):
    domain, attempt = saving(control, store, domid, path, **options)
    try:
        return attempt.run()
    finally:
        domain.close()


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
    expect_accepted(tmp_path / "guest")
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
    expect_accepted(tmp_path / "guest")
    destroy(domain_name)
    xl("restore", "-p", tmp_path / "guest")
    restored = low_memory(control, domid_of(domain_name), MEMORY_BYTES)
    assert restored.read(last_page << 12, 4096) == expected
    restored.close()
    outside.close()


@pytest.mark.parametrize("phase", PHASES)
def test_a_failure_in_any_phase_leaves_the_domain_as_it_was(control, store, working, tmp_path, phase):
    domid, memory = working
    run_cancelled(phase, partial(saving, control, store, domid, tmp_path / "guest"))
    assert not (tmp_path / "guest").exists()
    info = control.info(domid)
    assert (info.paused, info.shutdown_reason) == (False, None)
    assert log_dirty_is_off(control, domid)
    wait_for_work(memory, 100)


@pytest.mark.parametrize("moment", [*PHASES, "first-round", "end"])
def test_a_kill_at_any_moment_is_undone_by_the_next_start(control, store, working, tmp_path, moment):
    domid, memory = working
    run_killed(moment, domid, path=tmp_path / "guest")
    found = seen(control, store, domid)
    assert (found.log_dirty, found.status) == (False, "running")
    wait_for_work(memory, 100)
    assert (tmp_path / "guest").exists() is (moment == "end")


def test_what_xl_saved_is_read_and_shown(control, store, domain_name, working, tmp_path):
    domid, _ = working
    with as_its_driver(control, store, domid):
        xl("save", "-c", str(domid), tmp_path / "theirs")
    expect_accepted(tmp_path / "theirs")
    with (tmp_path / "theirs").open("rb") as file:
        inside = Inside(file.readinto)
        names = {record.name for record in Walk(inside)}
        assert inside.finish() == [("END", 0)]
    assert {"PAGE_DATA", "HVM_CONTEXT", "HVM_PARAMS", "TSC_INFO"} <= names
    shown = json.loads(pageferry("inspect", tmp_path / "theirs", "--json"))
    assert shown["envelope"]["domain"]["name"] == domain_name
    print(shown)
