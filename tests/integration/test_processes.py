"""Two real processes, driven by the command line and the control socket; kills of either side in each phase."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from at_work import until
from processes import GIVE_UP_S, cli, one_line
from qemu.qmp import ExecuteError, QMPClient
from tiers import sample

from pageferry.core.host_cpu import HostCpu
from pageferry.kvm.probe import probe
from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.format import RecordType
from pageferry.stream.packing import available
from pageferry.vmm.qmp_error import QmpError

#: Works, and leaves the host to the commands.
GUEST = ("kv", "--memory", "32M", "--working-set", "4M", "--rate", "5000")


@pytest.fixture
def processes(start, process_accel):
    def make(kind):
        arguments = ("run", *GUEST) if kind == "source" else ("receive", "tcp://127.0.0.1:0")
        return start(*arguments, "--accel", process_accel)

    return make


#: However slow the host is, the guest is paused after one round.
UNHURRIED = ("--downtime-limit", "60000")


#: The word that a commit gives is good for no longer than the connection may stand still.
SHORT_LEASE = ("--timeout", "4")


def migrate(source, uri, *arguments):
    limit = () if "--policy" in arguments else UNHURRIED
    return cli("migrate", "--control", source.control, uri, *limit, *arguments)


def test_a_guest_moves_by_the_command_line(processes, process_accel):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    assert destination.status() == "inmigrate"
    where = str(destination.endpoint())
    result = migrate(source, where, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["status"] == "completed"
    assert report["guest_at"] == "destination"
    assert report["source_accel"] == report["destination_accel"] == process_accel
    assert report["memory_bytes"] == 32 << 20
    assert report["verified"] is True
    assert report["verified_pages"] > 0
    assert {"rtc", "console", "timer", "clock"} <= {each["name"] for each in report["devices"]}
    assert {"tracker", "total_s", "state_bytes", "downtime_s", "downtime_parts_s", "fault_count"} <= set(report)
    for each in report["rounds"]:
        assert {"index", "dirty_pages", "sent_pages", "sent_bytes", "duration_s"} <= set(each)
    assert "round 0" in result.stderr
    assert source.status() == "postmigrate"
    assert destination.runs_on()
    deaf = cli("shutdown", "--control", destination.control)
    assert "does not listen to a power button" in one_line(deaf)
    assert deaf.returncode == 2
    assert ": the guest is not here any more; it ran on " in cli("status", "--control", source.control).stdout
    assert json.loads(cli("status", "--control", destination.control, "--json").stdout)["status"] == "running"
    again = migrate(source, "tcp://127.0.0.1:1")
    assert again.returncode == 2
    assert f"the guest has left for {where}: use the control socket of that process" in one_line(again)
    assert f"the guest has left for {where}" in one_line(migrate(source, where, "--recover"))
    assert cli("resume", "--control", source.control).returncode == 2
    assert cli("quit", "--control", source.control).returncode == 0
    assert source.popen.wait(GIVE_UP_S) == 0
    assert not source.control.exists()


def test_a_guest_moves_packed_over_several_connections_by_the_command_line(processes):
    packing = next(iter(available()), None)
    if packing is None:
        pytest.skip("neither lz4 nor zstd is installed")
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    wire = ("--bandwidth", "256M", "--connections", "3", "--compress", packing, "--delta-cache", "64M")
    result = migrate(source, str(destination.endpoint()), "--policy", "xen", *wire, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["connections"], report["compress"], report["delta_cache_bytes"]) == (3, str(packing), 64 << 20)
    assert report["bandwidth_bytes_per_s"] == 256 << 20
    assert report["verified"] is True
    packed = sum(each["packed_pages"] for each in report["rounds"])
    state = source.ask("query-migrate")
    assert state["x-pageferry-packed"]["pages"] == packed > 0
    zeros = sum(each["zero_pages"] for each in report["rounds"])
    assert state["ram"]["duplicate"] == zeros
    assert state["ram"]["normal"] + zeros == sum(each["sent_pages"] for each in report["rounds"])
    assert destination.runs_on()


def tour(start, *stops):
    """Run a guest at the first stop (options) and move it from each to the next; yield each process that has it."""
    first, *others = stops
    here = start("run", "kv", "--memory", "8M", "--working-set", "1M", "--rate", "5000", *first)
    assert here.runs_on()
    yield here
    for options in others:
        there = start("receive", "tcp://127.0.0.1:0", *options)
        result = migrate(here, str(there.endpoint()), "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["verified"] is True
        assert there.runs_on()
        here.end()
        here = there
        yield here


def test_a_guest_crosses_accels_and_paging_modes(start, kvm_support):
    kvm, soft = ("--accel", "kvm"), ("--accel", "soft", "--tracker")
    seen = []
    for process in tour(start, kvm, (*soft, "hap"), (*soft, "shadow"), (*soft, "hap"), kvm):
        state = process.ask("x-query-guest")
        seen.append((state["accel"], state["tracker"]))
        assert f"vCPUs 1, CPU baseline ({state['cpu_name']})" in cli("status", "--control", process.control).stdout
    assert seen == [("kvm", "kvm-bitmap"), ("soft", "hap"), ("soft", "shadow"), ("soft", "hap"), ("kvm", "kvm-bitmap")]


def test_a_guest_with_all_of_the_host_is_refused_where_that_is_not_had(start, kvm_support):
    source = start("run", *GUEST, "--accel", "kvm", "--cpu", "host")
    soft = start("receive", "tcp://127.0.0.1:0", "--accel", "soft")
    assert source.ask("x-query-guest")["cpu"] == "host"
    result = migrate(source, str(soft.endpoint()))
    assert result.returncode == 3
    said = one_line(result)
    assert "the software machine lacks " in said
    assert "which the guest was given (phase hello, guest at source)" in said
    assert "hint: choose a host that has it; a guest started with --cpu baseline goes anywhere" in result.stderr
    assert source.runs_on()
    assert soft.status() == "inmigrate"


def test_a_guest_that_sees_the_cpu_of_its_host_is_warned_of(start, process_accel):
    shown = process_accel == "kvm" and not probe().exact_cpuid
    process = start("run", *GUEST, "--accel", process_accel)
    host = process.ask("x-query-guest")["host_cpu"]
    if host is None:
        pytest.skip("this host does not tell what CPU it has")
    assert host["keeps_cpuid"] is not shown
    warned = [line for line in process.log.read_text().splitlines() if line.startswith("warning: ")]
    assert len(warned) == shown
    assert (f"warning: {HostCpu(**host).warning}" in cli("status", "--control", process.control).stdout) is shown
    assert all(host["name"] in line for line in warned)
    there = start("receive", "tcp://127.0.0.1:0", "--accel", process_accel)
    result = migrate(process, str(there.endpoint()), "--json")
    warnings = json.loads(result.stdout)["warnings"]
    assert len(warnings) == shown
    assert all(
        f"warning: {line}\n" in result.stderr and "the destination's CPU is the same" in line for line in warnings
    )
    for end in (process, there):  # each names the CPU once: the second time, only what is new
        assert end.log.read_text().count(host["name"]) == shown
        assert end.log.read_text().count("warning: the destination's CPU is the same") == shown


def test_huge_pages_at_each_end_are_its_own_affair(start, thp, hugetlb_pool, kvm_support):
    kvm = ("--accel", "kvm", "--hugepages")
    stops = ((*kvm, "hugetlb"), ("--accel", "soft", "--hugepages", "thp"), kvm[:2], (*kvm, "hugetlb"))
    stops += ((*kvm, "off"), (*kvm, "anonymous"))
    kinds = ("hugetlb", "thp", "thp", "hugetlb", "off", "anonymous")  # auto, where the kernel gives memfds huge pages
    for process, expected in zip(tour(start, *stops), kinds, strict=True):
        state = process.ask("x-query-guest")
        text = cli("status", "--control", process.control).stdout
        assert state["huge_pages"] == expected
        if expected == "off":
            assert state["huge_bytes"] is None
            assert "huge" not in text
        else:
            assert state["huge_bytes"] % (2 << 20) == 0
            assert state["huge_bytes"] > 0
            assert f"in huge pages, {expected})" in text


def test_a_destination_without_huge_pages_left_refuses_and_waits_on(start, hugetlb_pool, kvm_support):
    source = start("run", "kv", "--memory", "64M", "--working-set", "1M")
    destination = start("receive", "tcp://127.0.0.1:0", "--accel", "kvm", "--hugepages", "hugetlb")
    for _ in range(2):
        refused = migrate(source, str(destination.endpoint()))
        assert refused.returncode == 3, refused.stderr
        assert "pool of 2 MiB pages cannot give 32" in one_line(refused)
        assert "vm.nr_hugepages=" in refused.stderr
        assert destination.status() == "inmigrate"
        assert source.runs_on()


def test_a_person_sees_rounds_and_a_summary(processes):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    result = migrate(source, str(destination.endpoint()), "--policy", "xen", "--max-rounds", "2")
    assert result.returncode == 0, result.stderr
    for word in (
        "migration completed",
        "verified",
        "devices, saved in",
        "downtime",
        "stop-and-copy",
        "handoff",
        "rounds over time",
        "in words",
        "The wire moved ",
    ):
        assert word in result.stdout
    assert result.stderr.count("pages") >= 2


def test_pause_and_resume(processes):
    source = processes("source")
    assert source.runs_on()
    assert cli("pause", "--control", source.control).returncode == 0
    assert source.status() == "paused"
    before = source.work()
    assert source.work() == before
    assert cli("resume", "--control", source.control).returncode == 0
    assert source.runs_on()
    source.popen.terminate()
    assert source.popen.wait(GIVE_UP_S) == 0


def u32(number):
    return int(number).to_bytes(4, "little")


#: What the wire shows first of each phase that comes before the commit.
BEFORE_COMMIT = {
    "hello": u32(FrameType.SOURCE_HELLO),
    "hello-answered": u32(FrameType.DESTINATION_HELLO),
    "pre-copy": u32(RecordType.STATIC_DATA_END) + u32(0),
    "state": u32(RecordType.TSC_INFO) + u32(24),
    "verify": u32(FrameType.DIGESTS),
    "ready": u32(FrameType.READY),
}
PHASES = sample(BEFORE_COMMIT, "one phase before the pause and one behind it", quick=["pre-copy", "ready"])


def kill_during(marker, victim, source, destination, wires, *options):
    """Migrate with these options, and kill the victim with the wire held at ``marker``; return what the command did."""
    wire = wires(destination.endpoint(), hold_at=marker)
    results = []
    thread = threading.Thread(target=lambda: results.append(migrate(source, wire.uri, *options)))
    thread.start()
    assert wire.held.wait(GIVE_UP_S)
    (source if victim == "source" else destination).end()
    wire.cut()  # what is held is lost
    wire.release()
    thread.join(GIVE_UP_S)
    assert results, "the command line hangs"
    return results[0]


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_destination_leaves_the_guest_running(processes, wires, phase):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    result = kill_during(BEFORE_COMMIT[phase], "destination", source, destination, wires)
    assert result.returncode == 3, result.stderr
    assert "guest at source" in one_line(result)
    assert source.runs_on()
    second = migrate(source, str(processes("destination").endpoint()))
    assert second.returncode == 0, second.stderr


def test_a_destination_killed_with_the_commit_under_way_is_unknown(processes, wires):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    result = kill_during(u32(FrameType.COMMIT), "destination", source, destination, wires, *SHORT_LEASE)
    assert result.returncode == 4, result.stderr
    assert "guest at unknown" in one_line(result)
    assert source.status() == "postmigrate"
    refused = cli("resume", "--control", source.control)
    assert refused.returncode == 2
    assert "not known" in one_line(refused)
    assert cli("resume", "--force", "--control", source.control).returncode == 0
    assert source.runs_on()
    second = migrate(source, str(processes("destination").endpoint()))
    assert second.returncode == 0, second.stderr


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_source_leaves_the_destination_waiting(processes, wires, phase):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    result = kill_during(BEFORE_COMMIT[phase], "source", source, destination, wires)
    assert result.returncode == 6, result.stderr
    until(lambda: "no guest received" in destination.log.read_text(), "message")
    assert destination.status() == "inmigrate"
    other = processes("source")
    assert other.runs_on()
    assert migrate(other, str(destination.endpoint())).returncode == 0
    assert destination.runs_on()


def test_a_source_killed_after_the_commit_leaves_one_guest_at_the_destination(processes, wires):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    kill_during(u32(FrameType.RUNNING), "source", source, destination, wires)
    until(lambda: destination.status() == "running", "guest at the destination")
    assert destination.runs_on()


def test_a_kill_in_mid_stream(processes, wires):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    wire = wires(destination.endpoint(), cut_after_bytes=100_000)
    result = migrate(source, wire.uri)
    assert result.returncode == 3, result.stderr
    assert source.runs_on()
    destination.end()
    assert migrate(source, str(processes("destination").endpoint())).returncode == 0


def test_ctrl_c_cancels_and_the_guest_runs_on(processes, wires, background):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    wire = wires(destination.endpoint(), hold_at=u32(FrameType.READY))
    client = background("migrate", "--control", source.control, wire.uri, *UNHURRIED, text=True)
    assert wire.held.wait(GIVE_UP_S)
    assert source.status() == "finish-migrate"
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=GIVE_UP_S)
    assert client.returncode == 130, err
    assert "cancelled; the guest stays at the source" in err
    assert source.runs_on()
    assert source.ask("query-migrate")["status"] == "cancelled"


def test_a_guest_that_is_being_handed_over_cannot_be_paused(processes, wires):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    wire = wires(destination.endpoint(), hold_at=u32(FrameType.RUNNING))
    thread = threading.Thread(target=migrate, args=(source, wire.uri))
    thread.start()
    assert wire.held.wait(GIVE_UP_S)
    for command in ("pause", "resume"):
        assert "being handed over" in one_line(cli(command, "--control", source.control))
    wire.release()
    thread.join(GIVE_UP_S)
    assert destination.runs_on()


def test_a_reader_of_the_console_that_stands_still_or_leaves_does_no_harm(tmp_path, process_accel, background):
    control = tmp_path / "x.sock"
    for leaves in (False, True):
        popen = background("run", *GUEST, "--control", control, "--accel", process_accel, stderr=subprocess.DEVNULL)
        if leaves:
            popen.stdout.close()
        until(control.is_socket, "control socket")
        until(lambda: json.loads(cli("status", "--control", control, "--json").stdout).get("work", [0])[0] > 0, "work")
        assert cli("pause", "--control", control).returncode == 0
        assert cli("resume", "--control", control).returncode == 0
        assert cli("quit", "--control", control).returncode == 0
        assert popen.wait(GIVE_UP_S) == 0


def test_the_threads_of_the_vcpus_are_told(processes):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    (cpu,) = source.ask("query-cpus-fast")
    assert (cpu["cpu-index"], cpu["target"]) == (0, "x86_64")
    assert Path("/proc", str(source.popen.pid), "task", str(cpu["thread-id"])).exists()
    assert cpu["thread-id"] != source.popen.pid
    with pytest.raises(QmpError, match="no guest is here yet"):
        destination.ask("query-cpus-fast")


def test_an_existing_qmp_client_works(processes):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    uri = str(destination.endpoint())

    async def talk():
        client = QMPClient("tester")
        await client.connect(str(source.control))
        seen = []
        with client.listener() as events:
            assert (await client.execute("query-status"))["status"] == "running"
            await client.execute("stop")
            assert (await client.execute("query-status"))["running"] is False
            await client.execute("cont")
            with pytest.raises(ExecuteError, match="has not been found"):
                await client.execute("eject")
            with pytest.raises(ExecuteError, match="unexpected"):
                await client.execute("stop", {"hard": True})
            with pytest.raises(ExecuteError, match="missing"):
                await client.execute("migrate")
            assert await client.execute("query-migrate") == {}
            await client.execute("migrate_cancel")
            await client.execute("migrate", {"uri": uri.replace("tcp://", "tcp:")})
            async for event in events:
                seen.append(event["event"])
                if event["event"] == "MIGRATION" and event["data"]["status"] in ("completed", "failed"):
                    break
        state = await client.execute("query-migrate")
        await client.execute("quit")
        with contextlib.suppress(EOFError):  # it hung up, as it was told
            await client.disconnect()
        return seen, state

    seen, state = asyncio.run(talk())
    assert state["status"] == "completed"
    assert state["ram"]["total"] == 32 << 20
    assert state["ram"]["transferred"] > 0
    assert state["downtime"] >= 0
    assert state["x-pageferry-report"]["guest_at"] == "destination"
    assert [name for name in seen if name in ("STOP", "RESUME", "MIGRATION")][:3] == ["STOP", "RESUME", "MIGRATION"]
    assert "MIGRATION_PASS" in seen
    assert source.popen.wait(GIVE_UP_S) == 0
    assert destination.runs_on()


def test_the_control_socket_survives_garbage(processes):
    source = processes("source")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(source.control))
        lines = sock.makefile("rwb")
        assert "QMP" in json.loads(lines.readline())

        def say(data):
            lines.write(data + b"\n")
            lines.flush()
            return json.loads(lines.readline())

        assert say(b'{"execute":"query-status"}')["error"]["class"] == "CommandNotFound"
        assert say(b'{"execute":"qmp_capabilities","id":7}') == {"return": {}, "id": 7}
        for garbage in (b"nonsense", b"[]", b'{"execute":5}', b'{"execute":"stop","arguments":[]}', b"\xff\xfe"):
            assert "error" in say(garbage)
        assert say(b'{"execute":"migrate","arguments":{"uri":"tcp:1.2.3.4:5","x-timeout-s":true}}')["error"]
        assert say(b'{"execute":"query-status"}')["return"]["status"] == "running"
    with pytest.raises(QmpError, match="not an address"):
        source.ask("migrate", uri="fax:5551234")
    assert source.runs_on()


def test_a_control_socket_left_behind_is_taken_over_and_a_living_one_is_not(start, processes):
    source = processes("source")
    taken = cli("run", *GUEST, "--control", source.control, "--accel", "soft")
    assert taken.returncode == 2
    assert "cannot listen on the control socket" in one_line(taken)
    source.end()
    assert source.control.is_socket()
    assert start("run", *GUEST, "--accel", "soft", name=source.control.stem).runs_on()


def test_a_migration_that_is_held_is_watched_limited_and_let_go(processes):
    source, destination = processes("source"), processes("destination")
    assert source.runs_on()
    kept = cli("limits", "--control", source.control, "--bandwidth", "1G", "--downtime-limit", "80000")
    assert (kept.returncode, kept.stderr) == (
        0,
        "pageferry: no migration is under way: the limits are kept for the next one\n",
    )
    assert source.ask("query-migrate-parameters") == {"downtime-limit": 80000, "max-bandwidth": 1 << 30}
    assert "no migration in progress" in one_line(cli("switch", "--control", source.control))
    none = cli("cancel", "--control", source.control)
    assert (none.returncode, none.stderr) == (0, "pageferry: no migration is under way\n")
    later = cli("limits", "--control", source.control, "--deadline", "3").stderr
    assert later.endswith("kept for the next one; a deadline is for --policy deadline only\n")
    done = []
    thread = threading.Thread(
        target=lambda: done.append(migrate(source, destination.ask("x-query-guest")["listening"], "--hold"))
    )
    thread.start()
    until(lambda: source.ask("query-migrate").get("status") == "pre-switchover", "ready migration")
    assert source.runs_on()
    status = cli("status", "--control", source.control)
    assert "migration pre-switchover: " in status.stdout
    assert "held until it is told to go on" in status.stdout
    told = json.loads(cli("status", "--json", "--control", source.control).stdout)["migration"]
    assert told["x-eta-s"] is None
    assert told["expected-downtime"] >= 0
    assert "has no deadline" in one_line(cli("limits", "--control", source.control, "--deadline", "3"))
    assert "no limit was given" in one_line(cli("limits", "--control", source.control))
    assert cli("limits", "--control", source.control, "--bandwidth", "1G", "--downtime-limit", "70000").returncode == 0
    assert cli("switch", "--control", source.control).returncode == 0
    thread.join(GIVE_UP_S)
    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stderr.count("held; `pageferry switch` lets it go on") == 1
    assert destination.runs_on()
    assert json.loads(cli("status", "--json", "--control", source.control).stdout)["migration"] is None


def test_a_migration_is_cancelled_from_elsewhere(processes):
    source, destination = processes("source"), processes("destination")
    done = []
    thread = threading.Thread(
        target=lambda: done.append(migrate(source, destination.ask("x-query-guest")["listening"], "--hold"))
    )
    thread.start()
    until(lambda: source.ask("query-migrate").get("status") == "pre-switchover", "ready migration")
    uri = str(destination.endpoint())
    assert cli("cancel", "--control", source.control).returncode == 0
    again = migrate(source, uri)  # at once: neither end is busy with what was cancelled
    thread.join(GIVE_UP_S)
    assert done[0].returncode == 130
    assert again.returncode == 0, again.stderr
    assert destination.runs_on()
