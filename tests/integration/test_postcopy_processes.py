"""Post-copy between real processes: cut, gone on with, and lost, as the command line and the control socket tell it."""

import json
import signal
import subprocess
import threading

import pytest
from at_work import until
from processes import GIVE_UP_S, cli

from pageferry.stream.ferry_frames import FrameType
from pageferry.vmm.qmp_error import QmpError

#: Switches as soon as so much is dirty that something is missing for certain, however slow the guest is.
POLICY = """
from pageferry.core.policy import Action, Decision

class Switch:
    switches = True

    def decide(self, progress):
        action = Action.POST_COPY if progress.last.remaining_pages >= 64 else Action.NEXT_ROUND
        return Decision(action=action, reason="so")
"""


ALLOW = ("--allow-policy", "switching:Switch")


@pytest.fixture
def pair(tmp_path, process_accel, start):
    """A source whose guest works, and a destination."""
    (tmp_path / "switching.py").write_text(POLICY)
    source = start("run", "kv", "--memory", "32M", "--rate", "20000", "--accel", process_accel, *ALLOW, name="source")
    destination = start("receive", "tcp://127.0.0.1:0", "--accel", process_accel, name="destination")
    source.runs_on()
    return source, destination


def migration(process):
    """How far the migration is, by the source's word."""
    return process.ask("query-migrate")["status"]


def migrate(source, uri, *arguments):
    return cli("migrate", "--control", source.control, uri, *arguments)


SWITCH = ("--policy", "switching:Switch", "--json", "--timeout", GIVE_UP_S)


def cut_at(frame, source, destination, wires, *options):
    """Migrate with these options until such a frame is under way, and cut there; return what the command said."""
    wire = wires(destination.endpoint(), hold_at=int(frame).to_bytes(4, "little"))
    results = []
    thread = threading.Thread(target=lambda: results.append(migrate(source, wire.uri, *SWITCH, *options)))
    thread.start()
    assert wire.held.wait(GIVE_UP_S)
    if frame is FrameType.PAGES:
        assert migration(source) == "postcopy-active"
        assert destination.ask("x-query-guest")["missing_pages"] >= 64
    wire.cut()
    wire.release()
    thread.join(GIVE_UP_S)
    assert results, "the command line hangs"
    return results[0]


def test_a_guest_switches_by_the_command_line(pair):
    source, destination = pair
    result = migrate(source, str(destination.endpoint()), *SWITCH)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["status"], report["guest_at"]) == ("completed", "destination")
    assert report["postcopy"]["missing_pages"] >= 64
    assert "It switched the guest after" in report["explanation"]["outcome"]
    assert destination.runs_on()
    until(lambda: destination.ask("x-query-guest")["missing_pages"] == 0, "end of the pages")
    assert cli("quit", "--control", source.control).returncode == 0


def test_a_cut_after_the_switch_is_recovered(pair, wires):
    source, destination = pair
    result = cut_at(FrameType.PAGES, source, destination, wires)
    assert result.returncode == 11, result.stderr
    assert "Traceback" not in result.stderr
    assert "the guest stands still there, and pages of it are only here" in result.stderr
    assert "hint: to go on: pageferry migrate --recover --control PATH URI" in result.stderr
    assert migration(source) == "postcopy-paused"
    until(lambda: destination.ask("query-status")["status"] == "paused", "pause there")
    state = destination.ask("x-query-guest")
    assert (state["work"], state["missing_pages"] > 0, state["waits_for_source"]) == ([], True, True)
    said = cli("status", "--control", destination.control).stdout
    assert "the guest stands still: the connection to its source was cut" in said
    assert "If that process has ended, the guest is lost" in said
    info = source.ask("query-migrate")
    assert (info["x-eta-s"], info["x-guest-at"]) == (None, "destination")
    assert info["ram"]["remaining"] >= 64 * 4096
    assert "migrate --recover --control PATH URI" in cli("status", "--control", source.control).stdout
    commands = ((source, "quit"), (source, "cont"), (source, "stop"), (destination, "stop"), (destination, "quit"))
    for process, command in commands:
        with pytest.raises(QmpError, match=r"needs pages|has left|stands still"):
            process.ask(command)
    again = migrate(source, "tcp://127.0.0.1:1", "--recover")  # no process there: it waits on
    assert again.returncode == 11, again.stderr
    assert "cannot connect" in again.stderr or "was cut" in again.stderr
    destination_uri = str(destination.endpoint())
    recovered = migrate(source, destination_uri, "--recover", "--json")
    assert recovered.returncode == 0, recovered.stderr
    report = json.loads(recovered.stdout)
    assert (report["status"], report["postcopy"]["cuts"]) == ("completed", 1)
    assert destination.runs_on()
    assert destination.ask("query-status")["status"] == "running"
    refused = migrate(source, "tcp://127.0.0.1:1", "--recover")
    assert refused.returncode == 2
    assert f"the guest has left for {destination_uri}" in refused.stderr
    assert cli("quit", "--control", source.control).returncode == 0


@pytest.mark.parametrize(("times", "code"), [(1, 0), (2, 11)])
def test_ctrl_c_after_the_switch_says_that_it_is_too_late(pair, wires, background, times, code):
    source, destination = pair
    wire = wires(destination.endpoint(), hold_at=int(FrameType.PAGES).to_bytes(4, "little"))
    client = background("migrate", "--control", source.control, wire.uri, *SWITCH, stdout=subprocess.DEVNULL, text=True)
    assert wire.held.wait(GIVE_UP_S)
    said = ""
    client.send_signal(signal.SIGINT)
    while "too late to cancel" not in said:
        line = client.stderr.readline()
        assert line, said
        said += line
    assert "the guest has switched, and its pages follow; a later Ctrl-C leaves it" in said
    there = cli("status", "--control", destination.control).stdout
    assert "are still coming from its source; if that process ends" in there
    assert "being received" not in there
    assert "work done" not in there
    if times == 2:
        client.send_signal(signal.SIGINT)
        assert "the migration goes on by itself" in client.stderr.read()
        assert client.wait(GIVE_UP_S) == code
    wire.release()
    with client.stderr:
        assert client.wait(GIVE_UP_S) == code
    until(lambda: migration(source) == "completed", "end")
    assert destination.runs_on()


def test_a_switch_whose_answer_was_lost_is_recovered(pair, wires):
    source, destination = pair
    result = cut_at(FrameType.RUNNING, source, destination, wires)
    assert result.returncode == 4, result.stderr
    assert "whether the guest has switched is not known" in result.stderr
    assert "hint: to find out: pageferry migrate --recover --control PATH URI" in result.stderr
    for command, why in (("cont", "is not known"), ("quit", "needs pages"), ("migrate_cancel", "is not known")):
        with pytest.raises(QmpError, match=why):
            source.ask(command)
    recovered = migrate(source, str(destination.endpoint()), "--recover", "--json")
    assert recovered.returncode == 0, recovered.stderr
    assert json.loads(recovered.stdout)["postcopy"]["cuts"] == 1
    assert destination.runs_on()


def test_a_switch_that_was_lost_leaves_the_guest_here(pair, wires):
    source, destination = pair
    assert cut_at(FrameType.SWITCH, source, destination, wires).returncode == 4
    recovered = migrate(source, str(destination.endpoint()), "--recover")
    assert recovered.returncode == 3, recovered.stderr
    assert "never ran there" in recovered.stderr
    assert source.runs_on()
    assert destination.ask("query-status")["status"] == "inmigrate"
    assert migrate(source, str(destination.endpoint()), *SWITCH).returncode == 0
    assert destination.runs_on()


def test_a_guest_that_surely_runs_nowhere_is_taken_back(pair, wires):
    source, destination = pair
    short_lease = ("--timeout", "4")
    assert cut_at(FrameType.SWITCH, source, destination, wires, *short_lease).returncode == 4
    destination.popen.kill()
    destination.popen.wait()
    forced = cli("resume", "--force", "--control", source.control)
    assert forced.returncode == 2
    assert "the destination may start the guest for another" in forced.stderr
    until(lambda: cli("resume", "--force", "--control", source.control).returncode == 0, "end of the lease")
    assert source.runs_on()


def test_the_last_word_that_was_lost_is_said_again(pair, wires):
    source, destination = pair
    result = cut_at(FrameType.COMPLETE, source, destination, wires)
    assert result.returncode == 11, result.stderr
    assert destination.runs_on()
    state = destination.ask("x-query-guest")
    assert state["missing_pages"] == 0
    recovered = migrate(source, state["listening"], "--recover")
    assert recovered.returncode == 0, recovered.stderr
    until(lambda: destination.ask("x-query-guest")["listening"] is None, "end of the listening")
    assert cli("quit", "--control", source.control).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_source_that_dies_after_the_switch_leaves_a_guest_that_stands_still(pair, wires, number):
    source, destination = pair
    assert cut_at(FrameType.PAGES, source, destination, wires).returncode == 11
    source.popen.send_signal(number)
    source.popen.wait(GIVE_UP_S)
    assert destination.ask("query-status")["status"] in ("running", "paused")
    until(lambda: destination.ask("query-status")["status"] == "paused", "pause there")
    assert destination.ask("x-query-guest")["missing_pages"] >= 64
    refused = cli("quit", "--control", destination.control)
    assert refused.returncode == 2
    assert "the guest needs pages that are still at its source" in refused.stderr
    destination.popen.terminate()
    assert destination.popen.wait(GIVE_UP_S) == 0
    assert "the guest is lost" in destination.log.read_text()
