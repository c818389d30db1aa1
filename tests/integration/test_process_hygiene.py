"""Real commands under shells, terminals and signals: the outcome is told, whatever happens to these."""

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from at_work import until
from processes import GIVE_UP_S, PAGEFERRY, POLL_S, cli, launch, reap
from tiers import sample

from pageferry.core.errors import VmError
from pageferry.stream.ferry_frames import FrameType
from pageferry.vmm.qmp_client import QmpClient

ENDLESS = """
from pageferry.core.policy import Action, Decision

class Endless:
    def decide(self, progress):
        return Decision(action=Action.NEXT_ROUND, reason="for ever")
"""
GUEST = ("kv", "--memory", "16M", "--working-set", "1M", "--rate", "5000", "--accel", "soft")
EASY = ("--downtime-limit", "60000")


def ending_program(*, exits):
    """A program that waits for a key and then exits with code 3, or crashes."""
    last = "b003e6f4" if exits else "0f0b"  # mov al, 3; out 0xf4, al; or ud2
    code = bytes.fromhex("66bafd03" + "eca80174fb" + last)  # mov dx, 0x3fd; 1: in al, dx; test al, 1; jz 1b
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0x100078, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    size = 0x78 + len(code)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x100000, 0x100000, size, size, 0x1000) + code


@pytest.fixture
def pair(start):
    source, destination = start("run", *GUEST), start("receive", "tcp://127.0.0.1:0", "--accel", "soft")
    assert source.runs_on()
    return source, destination


def read_until(stream, text):
    said = b""
    while text not in said:
        line = stream.readline()
        assert line, said
        said += line


def u32(number):
    return int(number).to_bytes(4, "little")


@pytest.fixture
def held(pair, wires):
    """A migration's two ends, and a wire between them that holds the proof of the memory."""
    source, destination = pair
    return source, destination, wires(destination.endpoint(), hold_at=u32(FrameType.READY))


STORMS = {"two": (signal.SIGTERM, signal.SIGHUP), "three": (signal.SIGINT, signal.SIGINT, signal.SIGTERM)}


@pytest.mark.parametrize("storm", sample(STORMS, "one handler for all", quick=["two"]))
def test_signals_cancel_and_what_came_of_it_is_told(held, background, storm):
    source, destination, wire = held
    client = background("migrate", "--control", source.control, wire.uri, *EASY, "--json")
    assert wire.held.wait(GIVE_UP_S)
    for number in STORMS[storm]:
        client.send_signal(number)
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 130, err
    report = json.loads(out)
    assert (report["status"], report["guest_at"]) == ("cancelled", "source")
    assert err.decode().splitlines()[-1] == "pageferry: cancelled; the guest stays at the source"
    assert source.runs_on()
    assert destination.status() == "inmigrate"


def test_signals_cancel_a_save_and_leave_the_file_that_was_there(start, background, tmp_path):
    source, file = start("run", *GUEST), tmp_path / "guest.bin"
    assert source.runs_on()
    earlier = (GOLDEN / "pageferry-v3-1.bin").read_bytes()
    file.write_bytes(earlier)
    client = background("save", file, "--control", source.control, "--bandwidth", "64K", "--json")
    source.until(lambda: source.ask("query-migrate").get("status") == "active", "save under way")
    for number in STORMS["two"]:
        client.send_signal(number)
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 130, err
    report = json.loads(out)
    assert (report["status"], report["guest_at"], report["file"]) == ("cancelled", "source", str(file))
    assert err.decode().splitlines()[-1] == "pageferry: cancelled; the guest stays at the source"
    assert source.runs_on()
    assert file.read_bytes() == earlier
    assert [each.name for each in tmp_path.glob("*guest.bin*")] == [file.name]


@pytest.fixture
def short_path():
    """A directory whose path leaves room for a socket's; pytest's own grows with the test's name and its worker's."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.exhaustive("it follows by what migrate follows by")
def test_signals_cancel_the_migration_of_a_demo_and_leave_neither_process(background, tmp_path, short_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    environment = os.environ | {"TMPDIR": str(short_path), "PYTHONPATH": str(tmp_path)}
    command = ("demo", "--accel", "soft", "--memory", "16M", "--policy", "endless:Endless", "--json")
    client = background(*command, env=environment)
    (source,) = until(lambda: [*short_path.glob("*/source.sock")], "control socket")

    def connected():
        with contextlib.suppress(VmError):  # it is there before it listens
            return QmpClient(source)

    with until(connected, "answer at the control socket") as control:
        until(lambda: control.execute("query-migrate").get("status") == "active", "migration", POLL_S)
    for number in STORMS["two"]:
        client.send_signal(number)
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 130, err
    report = json.loads(out)
    assert (report["status"], report["guest_at"]) == ("cancelled", "source")
    assert err.decode().splitlines()[-1] == "pageferry: cancelled; the guest stays at the source"
    assert [*short_path.iterdir()] == []
    for pid in re.findall(rb"process (\d+)", err):
        assert not Path("/proc", pid.decode()).exists()


@pytest.mark.exhaustive("tests/unit/cli/test_client.py has the same without a guest")
def test_signals_that_come_too_late_change_nothing_of_what_is_told(pair, wires, background):
    source, destination = pair
    wire = wires(destination.endpoint(), hold_at=u32(FrameType.RUNNING))
    client = background("migrate", "--control", source.control, wire.uri, *EASY, "--json")
    assert wire.held.wait(GIVE_UP_S)
    client.send_signal(signal.SIGTERM)
    read_until(client.stderr, b"too late to cancel")
    client.send_signal(signal.SIGHUP)
    read_until(client.stderr, b"the guest is being handed over: the answer is waited for")
    wire.release()
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 0, err
    assert json.loads(out)["guest_at"] == "destination"
    assert destination.runs_on()


@pytest.mark.exhaustive("tests/unit/cli/test_signals.py has the same without a guest")
def test_a_hangup_that_was_ignored_at_the_start_stays_ignored(held, background):
    source, _, wire = held
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *PAGEFERRY]
    command = [*ignoring, "migrate", "--control", str(source.control), wire.uri, *EASY, "--json"]
    client = launch(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert wire.held.wait(GIVE_UP_S)
        client.send_signal(signal.SIGHUP)
        wire.release()
        out, err = client.communicate(timeout=GIVE_UP_S)
        assert client.returncode == 0, err
        assert json.loads(out)["status"] == "completed"
        assert b"cancelling" not in err
    finally:
        reap(client)


def test_before_anything_is_known_a_migration_is_in_setup_and_all_of_it_remains(pair, wires, background):
    source, destination = pair
    wire = wires(destination.endpoint(), hold_at=u32(FrameType.DESTINATION_HELLO))
    client = background("migrate", "--control", source.control, wire.uri, *EASY, "--json")
    assert wire.held.wait(GIVE_UP_S)
    info = source.ask("query-migrate")
    assert info["status"] == "setup"
    assert 0 < info["ram"]["remaining"] < info["ram"]["total"] == 16 << 20  # what it has touched
    assert "migration setup: " in cli("status", "--control", source.control).stdout
    wire.release()
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 0, err
    assert json.loads(out)["rounds"][0]["sent_pages"] >= info["ram"]["remaining"] // 4096


@pytest.mark.parametrize("ends", sample(["exits", "crashes"], "the process ends in the same way", quick=["exits"]))
def test_a_guest_that_ends_while_it_is_moved_is_told_of(start, wires, background, tmp_path, ends):
    """It ends in the middle of a round; its process stays until the command has heard how that ended."""
    program = tmp_path / "ends.elf"
    program.write_bytes(ending_program(exits=ends == "exits"))
    source = start("run", program, "--memory", "8M", "--accel", "soft")
    destination = start("receive", "tcp://127.0.0.1:0", "--accel", "soft")
    wire = wires(destination.endpoint(), hold_at=u32(FrameType.DESTINATION_HELLO))
    client = background("migrate", "--control", source.control, wire.uri, *EASY, "--json")
    assert wire.held.wait(GIVE_UP_S)
    source.ask("x-console-write", data="eA==")
    source.until(lambda: has_ended(source), "end")
    wire.release()
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 3, err
    report = json.loads(out)
    assert (report["status"], report["guest_at"]) == ("failed", "source")
    assert "the guest ended meanwhile" in report["error"]
    assert source.popen.wait(GIVE_UP_S) == (3 if ends == "exits" else 9)


def test_a_process_that_is_ended_while_it_migrates_says_that_its_guest_ended_with_it(held, background):
    source, destination, wire = held
    client = background("migrate", "--control", source.control, wire.uri, *EASY, "--json")
    assert wire.held.wait(GIVE_UP_S)
    refused = cli("quit", "--control", source.control)
    assert refused.returncode == 2
    assert "There's a migration process in progress" in refused.stderr
    assert "hint: pageferry cancel ends it first" in refused.stderr
    source.popen.terminate()
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 6, err
    assert json.loads(out)["guest_at"] is None
    assert b"the guest process was ended before the guest had left, and its guest with it" in err
    assert source.popen.wait(GIVE_UP_S) == 0
    assert destination.status() == "inmigrate"


def has_ended(process):
    guest = process.ask("x-query-guest")
    return guest["exit_code"] is not None or guest["crash"] is not None


def test_a_second_migration_meanwhile_is_wrong_usage(held, background):
    source, _, wire = held
    client = background("migrate", "--control", source.control, wire.uri, *EASY)
    assert wire.held.wait(GIVE_UP_S)
    second = cli("migrate", "--control", source.control, "tcp://127.0.0.1:1", "--json")
    assert second.returncode == 2
    told = json.loads(second.stdout)
    assert told["error"] == "There's a migration process in progress"
    assert told["hint"] == "pageferry status tells how far it is; pageferry cancel ends it"
    assert f"hint: {told['hint']}\n" in second.stderr
    wire.release()
    client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 0


@pytest.mark.exhaustive("tests/unit/cli/test_stdio.py has the same without a guest")
@pytest.mark.parametrize("stderr", ["/dev/full", "a pipe without a reader"])
def test_a_migration_is_followed_to_its_end_though_its_progress_cannot_be_written(pair, stderr):
    source, destination = pair
    if stderr == "/dev/full":
        writable = os.open(stderr, os.O_WRONLY)
    else:
        readable, writable = os.pipe()
        os.close(readable)
    uri = str(destination.endpoint())
    result = cli(
        "migrate",
        "--control",
        source.control,
        uri,
        *EASY,
        "--json",
        stdout=subprocess.PIPE,
        stderr=writable,
        capture_output=False,
    )
    os.close(writable)
    assert result.returncode == 0
    assert json.loads(result.stdout)["status"] == "completed"
    assert destination.runs_on()


@pytest.mark.exhaustive("tests/unit/cli/test_stdio.py has the same without a guest")
def test_a_migration_whose_report_cannot_be_written_has_happened_all_the_same(pair):
    source, destination = pair
    with open("/dev/full", "w") as full:
        options = {"stdout": full, "stderr": subprocess.PIPE, "capture_output": False}
        result = cli("migrate", "--control", source.control, destination.endpoint(), *EASY, **options)
    assert result.returncode == 0
    assert "pageferry: the result could not be written to standard output: No space left" in result.stderr
    assert destination.runs_on()


GOLDEN = Path(__file__).parents[1] / "golden"
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.exhaustive("tests/unit/cli/test_stdio.py has the same without a guest")
@pytest.mark.parametrize("locale", LOCALES)
def test_a_narrow_encoding_changes_characters_and_nothing_else(pair, tmp_path, locale):
    source, destination = pair
    narrow = {"env": os.environ | LOCALES[locale], "encoding": "latin-1"}
    name = tmp_path / os.fsdecode(b"gu\xffest.bin")
    saved = cli("save", name, "--control", source.control, *EASY, **narrow)
    assert saved.returncode == 0, saved.stderr
    assert "save completed" in saved.stdout
    moved = cli("migrate", "--control", source.control, destination.endpoint(), *EASY, **narrow)
    assert moved.returncode == 0, moved.stderr
    assert " dirty > " in moved.stderr
    assert "#" in moved.stdout
    assert "gu\\xffest.bin: whole" in cli("inspect", name, "--check", **narrow).stdout
    missing = cli("inspect", os.fsencode(name) + b"\xfe", **narrow)
    assert missing.returncode == 2
    assert "gu\\xffest.bin\\xfe" in missing.stderr


@pytest.mark.parametrize(
    "closed", sample([">&-", "2>&-", "<&- >&- 2>&-"], "all at once include each", quick=["<&- >&- 2>&-"])
)
def test_a_guest_runs_with_standard_streams_that_are_closed(tmp_path, closed):
    """None of its own files gets their numbers, so what is written there is lost."""
    control = tmp_path / "x.sock"
    shell = f'exec {sys.executable} -m pageferry "$@" {closed}'
    command = ["sh", "-c", shell, "sh", "run", *GUEST, "--control", str(control)]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        guest = launch(command, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        until(control.is_socket, lambda: f"control socket: {guest.poll()}")
        for fd in range(3):
            assert os.readlink(f"/proc/{guest.pid}/fd/{fd}") in ("/dev/null", str(log))
        if closed == ">&-":
            assert "pageferry: standard output is closed: the guest's console is dropped\n" in log.read_text()
        waiting = launch(["sh", "-c", shell, "sh", "receive", f"unix:{tmp_path}/in", "--control", f"{tmp_path}/y"])
        try:
            until((tmp_path / "y").is_socket, lambda: f"control socket: {waiting.poll()}")
            result = cli("migrate", "--control", control, f"unix:{tmp_path}/in", *EASY)
            assert result.returncode == 0, result.stderr
            assert cli("quit", "--control", tmp_path / "y").returncode == 0
            assert waiting.wait(GIVE_UP_S) == 0
        finally:
            reap(waiting)
        assert cli("quit", "--control", control).returncode == 0
        assert guest.wait(GIVE_UP_S) == 0
    finally:
        reap(guest)


@pytest.mark.parametrize(
    "number", sample([signal.SIGHUP, signal.SIGTERM, signal.SIGINT], "one handler for all", quick=[signal.SIGHUP])
)
def test_a_guest_process_ends_in_order_by_any_signal(start, number):
    process = start("run", *GUEST)
    process.popen.send_signal(number)
    process.popen.send_signal(number)
    assert process.popen.wait(GIVE_UP_S) == 0
    assert not process.control.exists()


def test_a_folder_that_is_gone_is_said_to_be(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    for arguments in (("save", "x", "--control", "/none/x"), ("run", "idle", "--machine", "pc", "--disk", "d")):
        shell = f'cd {gone}; rmdir {gone}; exec {sys.executable} -m pageferry "$@"'
        result = subprocess.run(
            ["sh", "-c", shell, "sh", *arguments], capture_output=True, text=True, timeout=GIVE_UP_S, check=False
        )
        gone.mkdir()
        assert result.returncode == 2, result.stderr
        assert "pageferry: the current folder was removed\n" in result.stderr


@pytest.mark.exhaustive("tests/unit/engine/wire/test_listener.py has the same without a guest")
def test_a_process_that_ends_leaves_the_socket_of_the_next_one_alone(start):
    first = start("run", *GUEST, name="same")
    first.control.unlink()  # removed by another program
    second = start("run", *GUEST, name="same")
    first.popen.send_signal(signal.SIGTERM)
    assert first.popen.wait(GIVE_UP_S) == 0
    assert second.status() == "running"


def test_the_hint_of_a_demo_s_process_reaches_the_user(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    options = {"env": os.environ | {"TMPDIR": str(folder)}}
    result = cli("demo", "--accel", "soft", "--memory", "16M", **options)
    assert result.returncode == 6, result.stderr
    assert "hint: the path of a socket has at most 107 bytes: choose a shorter one" in result.stderr


@pytest.mark.exhaustive("tests/unit/cli/test_client.py has the same without a guest")
def test_a_command_that_was_stopped_for_long_hears_the_outcome(pair, background):
    """As by Ctrl-Z, or on a terminal that was stopped by Ctrl-S: its process does not wait for it."""
    source, destination = pair
    client = background("migrate", "--control", source.control, destination.endpoint(), *EASY, "--hold", "--json")
    until(lambda: source.ask("query-migrate").get("status") == "pre-switchover", "ready migration")
    client.send_signal(signal.SIGSTOP)
    assert cli("switch", "--control", source.control).returncode == 0
    until(lambda: source.ask("query-migrate")["status"] == "completed", "end")
    client.send_signal(signal.SIGCONT)
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 0, err
    assert json.loads(out)["status"] == "completed"


@pytest.mark.exhaustive("tests/unit/cli/test_stdio.py has the same without these commands")
@pytest.mark.parametrize("locale", LOCALES)
def test_what_only_tells_does_so_in_a_narrow_encoding(tmp_path, locale):
    narrow = {"env": os.environ | LOCALES[locale], "encoding": "latin-1"}
    name = tmp_path / os.fsdecode(b"gu\xffest.bin")
    name.write_bytes((GOLDEN / "pageferry-v3-1.bin").read_bytes())
    for command in (("inspect", name), ("inspect", name, "--json"), ("doctor",), ("--help",)):
        result = cli(*command, **narrow)
        assert result.returncode == 0, result.stderr


#: A signal comes when the command has told its outcome and its process winds up.
_AT_THE_END = """
import atexit, signal, sys
import pageferry.__main__
atexit.register(signal.raise_signal, int(sys.argv.pop(1)))
pageferry.__main__.run()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_comes_when_the_outcome_was_told_changes_no_exit_code(tmp_path, number):
    command = [sys.executable, "-c", _AT_THE_END, str(number.value), "status", "--control", str(tmp_path / "none.sock")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 6, ended
    assert "Traceback" not in ended.stderr


#: What takes time to import is being imported when Ctrl-C comes.
_WHILE_LOADING = """
import importlib, signal
import pageferry.__main__
importlib.import_module = lambda name: signal.raise_signal(signal.SIGINT)
pageferry.__main__.run()
"""


def test_a_ctrl_c_while_a_command_is_loaded_ends_it_without_a_traceback():
    ended = subprocess.run([sys.executable, "-c", _WHILE_LOADING], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


#: Two signals come while a restore reads: what shows how far it is, is told between two reads.
_WHILE_READING = """
import signal
import pageferry.__main__
from pageferry.cli.progress import ReadingView

def show(view, done_pages, pages):
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGHUP)

ReadingView.show = show
pageferry.__main__.run()
"""


def test_a_restore_that_is_interrupted_while_it_reads_leaves_no_guest_and_the_file_as_it_was(start, tmp_path):
    file, control = tmp_path / "guest.bin", tmp_path / "x.sock"
    source = start("run", *GUEST)
    assert cli("save", file, "--control", source.control, *EASY).returncode == 0
    before = file.read_bytes()
    command = [sys.executable, "-c", _WHILE_READING, "restore", file, "--accel", "soft", "--control", control]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=GIVE_UP_S, check=False)
    assert ended.returncode == 130, ended
    assert ended.stderr.splitlines() == [
        "machine: soft (asked for)",
        "pageferry: ending already",
        "pageferry: interrupted",
    ]
    assert ended.stdout == ""
    assert not control.exists()
    assert file.read_bytes() == before
