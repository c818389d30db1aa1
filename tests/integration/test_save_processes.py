"""Saving and restoring by the command line: real processes, killed and out of room at every moment."""

import json
import os
import resource
import signal
import subprocess

import pytest
from at_work import until
from processes import GIVE_UP_S, cli, one_line
from unnamed import unnamed_in

from pageferry.engine.wire.pacer import BURST_S
from pageferry.vmm.qmp_client import QmpClient
from pageferry.vmm.qmp_error import QmpError

LIMIT = ("--downtime-limit", "600000")  # the host's speed decides nothing

#: A policy of a user's own that never stops copying.
ENDLESS = """
from pageferry.core.policy import Action, Decision

class Endless:
    def decide(self, progress):
        return Decision(action=Action.NEXT_ROUND, reason="for ever")
"""


@pytest.fixture(autouse=True)
def endless_policy(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)


@pytest.fixture
def guest(start):
    size = ("--memory", "32M", "--working-set", "4M", "--rate", "5000")
    process = start("run", "kv", *size, "--accel", "soft", "--allow-policy", "endless:Endless")
    assert process.runs_on()
    return process


@pytest.fixture
def file(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files" / "guest.bin"


def save(process, file, *arguments, **options):
    return cli("save", "--control", process.control, file, *LIMIT, *arguments, **options)


def test_a_guest_travels_by_files_between_the_machines(start, file, kvm_support):
    process = start("run", "kv", "--memory", "32M", "--working-set", "4M", "--rate", "5000", "--accel", "kvm")
    for step, accel in enumerate(("soft", "kvm", "soft")):
        assert process.runs_on()
        result = save(process, file, "--json")
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert (report["status"], report["guest_at"], report["file"]) == ("completed", "source", str(file))
        assert report["verified"] is True
        assert process.runs_on()  # a snapshot
        process.end()
        assert os.listdir(file.parent) == [file.name], step
        process = start("restore", file, "--accel", accel)
        assert process.ask("x-query-guest")["accel"] == accel
        assert process.ask("x-query-guest")["name"] == "guest"
    assert process.runs_on()


def test_a_save_has_a_bandwidth_and_no_packing(guest, file):
    result = cli("save", "--control", guest.control, file, "--bandwidth", "16M", "--policy", "xen", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["bandwidth_bytes_per_s"] == 16 << 20
    assert report["sent_bytes"] == file.stat().st_size
    assert report["sent_bytes"] <= 1.05 * (16 << 20) * (report["total_s"] + BURST_S)
    packed = save(guest, file, "--compress", "lz4")  # a pure libxc stream has no packed pages
    assert packed.returncode == 2
    assert "No such option" in one_line(packed)
    for uri_option in ("x-compress", "x-connections"):
        with pytest.raises(QmpError, match=f"{uri_option}.* unexpected"):
            guest.ask("migrate", **{"uri": f"file:{file}", uri_option: "lz4"})
    assert guest.runs_on()


def test_a_person_sees_what_was_saved_and_where(guest, file):
    result = save(guest, file.name, cwd=file.parent)
    assert result.returncode == 0, result.stderr
    for word in ("save completed", "saved to", "here it runs on", "verified", "downtime"):
        assert word in result.stdout
    assert "round 0" in result.stderr
    assert file.exists()


def test_a_guest_that_was_stopped_does_not_run_here_unless_it_is_forced(guest, start, file):
    result = save(guest, file, "--stop")
    assert result.returncode == 0, result.stderr
    assert "here it is stopped" in result.stdout
    assert guest.status() == "postmigrate"
    for command in ("resume", "pause"):
        refused = cli(command, "--control", guest.control)
        assert refused.returncode == 2
        assert f"was saved to {file} and stopped here" in one_line(refused)
    assert "was saved to" in one_line(save(guest, file))
    there = start("restore", file, "--accel", "soft")
    assert there.runs_on()
    there.end()
    assert cli("resume", "--force", "--control", guest.control).returncode == 0
    assert guest.runs_on()


def test_events_tell_of_the_pause_and_that_it_is_over(guest, file):
    with QmpClient(guest.control) as client:
        client.execute("migrate", **{"uri": f"file:{file}", "x-policy": "xen"})
        seen, statuses = [], []
        for event in client.events():
            seen.append(event["event"])
            if event["event"] == "MIGRATION":
                statuses.append(event["data"]["status"])
            if event["event"] == "MIGRATION" and event["data"]["status"] == "completed":
                break
    assert [name for name in seen if name in ("STOP", "RESUME")] == ["STOP", "RESUME"]
    assert statuses == ["setup", "active", "completed"]


def endless(guest, file):
    """Begin a save that would go on for ever; return when it has written something."""
    guest.ask("migrate", **{"uri": f"file:{file}", "x-policy": "endless:Endless"})
    until(lambda: any(each.stat().st_size > 1 << 20 for each in written_by(guest, file)), "page in the file")


def written_by(guest, file):
    """The unnamed files that a process writes where this one is to be."""
    return unnamed_in(file.parent, guest.popen.pid)


def test_a_process_killed_while_it_saves_leaves_the_earlier_file(guest, start, file):
    assert save(guest, file).returncode == 0
    before = file.read_bytes()
    endless(guest, file)
    guest.end()
    assert os.listdir(file.parent) == [file.name]
    assert file.read_bytes() == before
    there = start("restore", file, "--accel", "soft")
    assert there.runs_on()
    result = save(there, file)
    assert result.returncode == 0, result.stderr
    assert os.listdir(file.parent) == [file.name]


def test_ctrl_c_ends_a_save_and_the_guest_runs_on(guest, file, background):
    saving = background("save", "--control", guest.control, file, "--policy", "endless:Endless", text=True)
    for line in saving.stderr:
        if line.startswith("round 1"):
            break
    saving.send_signal(signal.SIGINT)
    _, errors = saving.communicate(timeout=GIVE_UP_S)
    assert saving.returncode == 130
    assert "cancelled; the guest stays at the source" in errors
    assert os.listdir(file.parent) == []
    assert guest.runs_on()


def test_two_that_save_to_one_file_do_not_disturb_each_other(guest, start, file):
    endless(guest, file)
    other = start("run", "idle", "--memory", "8M", "--accel", "soft")
    assert save(other, file).returncode == 0
    whole = file.read_bytes()
    assert "a migration process in progress" in one_line(save(guest, file))
    guest.ask("migrate_cancel")
    until(lambda: not written_by(guest, file), "end of the save")
    assert os.listdir(file.parent) == [file.name]
    assert file.read_bytes() == whole
    assert guest.runs_on()


def test_a_file_that_may_not_grow_so_long_leaves_the_guest_running(guest, file):
    old = resource.prlimit(guest.popen.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(guest.popen.pid, resource.RLIMIT_FSIZE, (1 << 16, old[1]))  # less than any guest holds
    result = save(guest, file)
    assert result.returncode == 3, result.stderr
    assert f"cannot write {file}: File too large" in one_line(result)
    assert "hint: nothing is left of it" in result.stderr
    assert os.listdir(file.parent) == []
    assert guest.runs_on()
    resource.prlimit(guest.popen.pid, resource.RLIMIT_FSIZE, old)
    assert save(guest, file).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_is_full_leaves_the_guest_running(guest, small_disk):
    # The guest holds less than the disk has; what is sent again and again does not fit.
    file = small_disk / "guest.bin"
    guest.ask("migrate", **{"uri": f"file:{file}", "x-policy": "endless:Endless"})
    until(lambda: guest.ask("query-migrate")["status"] == "failed", "end of the disk")
    assert "No space left on device" in guest.ask("query-migrate")["error-desc"]
    assert os.listdir(small_disk) == []
    assert guest.runs_on()


NOT_WHOLE = {
    "half": (lambda data: data[: len(data) // 2], "the stream stops after"),
    "one byte less": (lambda data: data[:-1], "in record header at byte"),
    "record": (lambda data: data[:40] + b"\xee" + data[41:], "(in record type 0xee at byte 40)"),
    "other file": (lambda data: b"\x7fELF" + data[4:], "this is an ELF file, not a libxc migration stream"),
    "empty": (lambda data: b"", "the stream stops after 0 bytes"),
}


def test_a_file_that_is_not_whole_is_refused_before_anything_runs(guest, file):
    assert save(guest, file).returncode == 0
    whole = file.read_bytes()
    for change, says in NOT_WHOLE.values():
        file.write_bytes(change(whole))
        refused = cli("restore", file, "--accel", "soft")
        assert refused.returncode == 7
        assert refused.stdout == ""
        assert says in one_line(refused)


def test_bad_names_are_refused_in_one_line(guest, tmp_path):
    assert "not a regular file" in one_line(save(guest, tmp_path))
    assert "No such file or directory" in one_line(save(guest, tmp_path / "none" / "x"))
    assert cli("restore", tmp_path / "none", "--accel", "soft").returncode == 2
    for uri in ("file:relative", "file:"):
        with pytest.raises(QmpError, match="not a file"):
            guest.ask("migrate", uri=uri)
    with pytest.raises(QmpError, match="'os:abort' was not named when the guest's process was started"):
        guest.ask("migrate", **{"uri": "file:/dev/null", "x-policy": "os:abort"})
    with pytest.raises(QmpError, match="x-stop"):
        guest.ask("migrate", **{"uri": "tcp:127.0.0.1:1", "x-stop": True})
    assert guest.runs_on()


def test_a_guest_runs_while_its_memory_is_read(guest, start, file):
    assert save(guest, file).returncode == 0
    there = start("restore", file, "--lazy", "--accel", "soft")
    assert there.runs_on()
    until(lambda: there.ask("x-query-guest")["unread_pages"] == 0, "end of the restore")
    assert "still to be read" not in cli("status", "--control", there.control).stdout
    result = until(lambda: (r := save(there, file)).returncode == 0 and r, "save")
    assert "save completed" in result.stdout
    assert there.runs_on()


def test_a_guest_that_its_user_paused_is_restored_paused(guest, start, file):
    for paused in (True, False):
        guest.ask("stop" if paused else "cont")
        assert save(guest, file).returncode == 0
        for options, stands in (((), paused), (("--lazy",), paused), (("--paused",), True), (("--run",), False)):
            there = start("restore", file, "--accel", "soft", *options)
            assert there.status() == ("paused" if stands else "running")
            if stands:
                there.ask("cont")
            assert there.runs_on()
            there.end()
    assert guest.runs_on()
