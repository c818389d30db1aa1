"""A stall after the freeze, and a second source meanwhile: the guest runs on, and all are told why."""

import json
import threading

import pytest
from at_work import until
from processes import GIVE_UP_S, cli, one_line
from tiers import sample

from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.format import RecordType

GUEST = ("kv", "--memory", "16M", "--working-set", "1M", "--rate", "5000", "--accel", "soft")
EASY = ("--downtime-limit", "60000")


def u32(number):
    return int(number).to_bytes(4, "little")


@pytest.fixture
def pair(start):
    source, destination = start("run", *GUEST), start("receive", "tcp://127.0.0.1:0", "--accel", "soft")
    assert source.runs_on()
    return source, destination


STALLS = {
    "state": u32(RecordType.TSC_INFO) + u32(24),
    "digests": u32(FrameType.DIGESTS),
    "ready": u32(FrameType.READY),
}


@pytest.mark.parametrize("stalls", sample(STALLS, "the source waits for the same answer", quick=["ready"]))
def test_a_pause_that_stalls_is_given_up_and_the_guest_runs_on(pair, wires, stalls):
    source, destination = pair
    wire = wires(destination.endpoint(), hold_at=STALLS[stalls])
    limit = ("--pause-limit", "1000")  # it comes to the proof in much less, on a busy host too
    result = cli("migrate", "--control", source.control, wire.uri, *EASY, *limit, "--json")
    assert result.returncode == 3, result.stderr
    assert "s: it waited for the destination to prove the memory (phase verify, guest at source)" in one_line(result)
    report = json.loads(result.stdout)
    assert (report["status"], report["guest_at"]) == ("failed", "source")
    assert "the pause was given up after" in report["reason"]
    assert "--pause-limit allows a longer pause" in report["hint"]
    assert source.runs_on()
    wire.cut()
    wire.release()
    until(lambda: "no guest received" in destination.log.read_text(), "end of the attempt there")
    again = cli("migrate", "--control", source.control, destination.endpoint(), *EASY)
    assert again.returncode == 0, again.stderr
    assert destination.runs_on()


def test_a_pause_is_not_given_up_once_the_commit_is_on_its_way(pair, wires, background):
    source, destination = pair
    wire = wires(destination.endpoint(), hold_at=u32(FrameType.RUNNING))
    limit_ms = 2000  # the commit is on its way in much less, on a busy host too
    limit = ("--pause-limit", str(limit_ms))
    client = background("migrate", "--control", source.control, wire.uri, *EASY, *limit, "--json")
    assert wire.held.wait(GIVE_UP_S)
    held_ms = source.ask("query-migrate")["total-time"]
    until(lambda: source.ask("query-migrate")["total-time"] > held_ms + limit_ms, "end of the budget")
    assert source.status() == "finish-migrate"
    wire.release()
    out, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 0, err
    assert json.loads(out)["guest_at"] == "destination"
    assert destination.runs_on()


@pytest.mark.exhaustive("the budget is the same code as of a migration")
def test_a_save_has_the_same_budget(start, tmp_path):
    source = start("run", *GUEST)
    assert source.runs_on()
    file = tmp_path / "guest.bin"
    slow = ("--bandwidth", "64K", "--max-rounds", "1", "--pause-limit", "1")
    result = cli("save", file, "--control", source.control, "--policy", "xen", *slow)
    assert result.returncode == 3, result.stderr
    assert "the pause was given up after" in one_line(result)
    assert not file.exists()
    assert source.runs_on()


def test_a_second_source_is_told_that_the_destination_is_busy(pair, start, wires):
    source, destination = pair
    wire = wires(destination.endpoint(), hold_at=u32(RecordType.STATIC_DATA_END) + u32(0))  # it stands still
    results = []
    thread = threading.Thread(
        target=lambda: results.append(cli("migrate", "--control", source.control, wire.uri, *EASY))
    )
    thread.start()
    assert wire.held.wait(GIVE_UP_S)
    other = start("run", *GUEST)
    assert other.runs_on()
    second = cli("migrate", "--control", other.control, destination.endpoint(), *EASY, "--json")
    assert second.returncode == 3, second.stderr
    assert "busy with another attempt" in one_line(second)
    assert "hint: try again when that has ended" in second.stderr
    assert other.runs_on()
    wire.release()
    thread.join(GIVE_UP_S)
    assert results[0].returncode == 0, results[0].stderr  # the first is not disturbed
    assert destination.runs_on()


@pytest.mark.exhaustive("each end gives a silent wire up in other tests too")
def test_both_ends_give_a_silent_wire_up_after_their_timeout(start, wires):
    source = start("run", *GUEST)
    destination = start("receive", "tcp://127.0.0.1:0", "--accel", "soft", "--timeout", "0.5")
    wire = wires(destination.endpoint(), hold_at=u32(RecordType.STATIC_DATA_END) + u32(0))
    result = cli("migrate", "--control", source.control, wire.uri, *EASY, "--timeout", "0.5")
    assert result.returncode == 3
    said = ("stood still for 0.5 s", "was cut", "the source stood still too long")  # whichever end is first
    assert any(each in one_line(result) for each in said)
    until(lambda: "no guest received: the source stood still" in destination.log.read_text(), "end there")
    assert source.runs_on()
