"""A stock Linux at work in a PVH domain: it suspends itself, goes on where it was saved, and finds nothing wrong."""

import contextlib
import re
import time
from pathlib import Path

import pytest
from xen_guests import (
    NAME,
    create,
    destroy,
    destroy_all,
    domid_of,
    log_dirty_is_off,
    moving,
    run_killed,
    saving,
    seen,
    xl,
)

from pageferry.core.errors import GuestAt, MigrationError
from pageferry.guests.linux.debian import LinuxImage
from pageferry.xen import uapi

IMAGE = LinuxImage.of(Path(__file__).parents[2] / "build" / "linux" / "cloud")
CONSOLE = Path(f"/var/log/xen/console/guest-{NAME}.log")
#: Of a copy that moved here: it has the name that Xen's receiver makes it under.
MOVED_CONSOLE = Path(f"/var/log/xen/console/guest-{NAME}--incoming.log")
GIVE_UP_S = 900.0


def rounds(console=CONSOLE):
    """The rounds of work that the guest has told of; it has found nothing wrong."""
    text = console.read_text(errors="replace") if console.exists() else ""
    assert "WRONG" not in text, text[-2000:]
    return [int(number) for number in re.findall(r"work: round (\d+)", text)]


def wait_for_rounds(more, console=CONSOLE):
    """Wait until the guest has done some more rounds; return the last."""
    begun, until = len(rounds(console)), time.monotonic() + GIVE_UP_S
    while len(rounds(console)) < begun + more:
        assert time.monotonic() < until, console.read_text(errors="replace")[-2000:]
        time.sleep(0.2)
    return rounds(console)[-1]


@pytest.fixture(scope="module")
def linux(worker, tmp_path_factory):
    """The number of a domain with a Linux at work, on two processors; only the last two tests let it end."""
    if not IMAGE.kernel.exists():
        pytest.skip("no Linux here: make linux-image ONLY=cloud")
    worker.end()
    CONSOLE.unlink(missing_ok=True)
    more = f'ramdisk = "{IMAGE.initramfs}"\ncmdline = "console=hvc0 pageferry=work"'
    folder = tmp_path_factory.mktemp("linux")
    domid = create(folder, NAME, memory_mib=96, vcpus=2, kernel=IMAGE.kernel, more=more, paused=False)
    wait_for_rounds(2)
    yield domid
    destroy_all()


def expect_at_work(control, store, linux):
    """It goes on as if nothing had been, and found nothing wrong."""
    assert store.read(f"/local/domain/{linux}/control/shutdown") == ""
    info = control.info(linux)
    assert (info.paused, info.shutdown_reason) == (False, None), CONSOLE.read_text(errors="replace")[-6000:]
    assert log_dirty_is_off(control, linux)
    wait_for_rounds(2)


def test_a_failure_after_it_suspended_itself_lets_it_go_on(control, store, linux, tmp_path):
    def fail():
        raise OSError(5, "the disk is gone")

    domain, attempt = saving(control, store, linux, tmp_path / "guest")
    domain.last_records = fail
    with contextlib.closing(domain), pytest.raises(MigrationError, match="the disk is gone"):
        attempt.run()
    expect_at_work(control, store, linux)


@pytest.mark.parametrize("moment", ["asked", "stop-and-copy", "handoff"])
def test_a_kill_while_it_suspends_itself_is_undone_by_the_next_start(control, store, linux, tmp_path, moment):
    run_killed(moment, linux, path=tmp_path / "guest")
    assert seen(control, store, linux).status == "running"
    expect_at_work(control, store, linux)


def test_it_is_saved_live_and_goes_on_here_and_from_the_file(control, store, linux, tmp_path):
    assert control.hvm_param(linux, uapi.HVM_PARAM_CALLBACK_IRQ)  # it has Xen's drivers
    domain, attempt = saving(control, store, linux, tmp_path / "guest")
    with contextlib.closing(domain):
        report = attempt.run()
    print(f"ours: total {report.total_s:.2f} s, downtime {report.downtime_s:.3f} s {report.downtime_parts_s}")
    print(f"      {len(report.rounds)} rounds, {report.sent_bytes >> 20} MiB, {report.warnings}")
    expect_at_work(control, store, linux)  # it was told that its suspend was cancelled
    last = wait_for_rounds(2)
    destroy(NAME)
    xl("restore", tmp_path / "guest")
    restored = wait_for_rounds(3)
    assert restored < last + 3  # from where it was saved, not from where it was destroyed
    assert control.info(domid_of(NAME)).shutdown_reason is None


@pytest.mark.usefixtures("linux")
def test_it_moves_live_through_xls_receiver_and_goes_on_there(control, store):
    here = domid_of(NAME)
    domain, attempt = moving(control, store, here)
    with contextlib.closing(domain):
        report = attempt.run()
    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    print(f"ours: total {report.total_s:.2f} s, downtime {report.downtime_s:.3f} s {report.downtime_parts_s}")
    assert control.info(here).shutdown_reason == uapi.SHUTDOWN_suspend
    last = rounds()[-1]
    there = domid_of(NAME)
    assert there != here
    wait_for_rounds(3, MOVED_CONSOLE)
    # What the console held at the pause may be told here, there, or half here and half there.
    assert last <= rounds(MOVED_CONSOLE)[0] <= last + 2
    info = control.info(there)
    assert (info.paused, info.shutdown_reason) == (False, None)
    assert log_dirty_is_off(control, there)
