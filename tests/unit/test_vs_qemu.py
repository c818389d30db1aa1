"""The comparison with QEMU: its guest image, what it measures from outside, and its verdicts."""

import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import compare_results
import vs_qemu
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.host_cpu import host_cpu
from pageferry.guests import abi
from pageferry.guests.workloads import load_workload
from peers.host import host_line
from peers.image import PROGRAM, Load, build_image
from peers.monitors import QEMU, PageferryPeer, QemuPeer, qemu_shim
from peers.move import Move
from peers.table import Spread, Targets, compare, growth_table, header, lines, short_header, short_line
from peers.warm import WarmMemory, free_bytes
from peers.watch import GuestWatch, read_count, wait_filled

MIB = 1 << 20
HALF = Targets(total=0.5, downtime=0.5, cpu=0.5)
LOAD = Load(memory_bytes=64 * MIB, filled_bytes=2 * MIB, rewritten_bytes=64 << 10)


def move(total_s, **changed):
    numbers = {"gap_s": 0.1, "downtime_s": 0.09, "verify_s": None, "sent_bytes": 1, "cpu_s": 1.0, "vcpu_s": 2.0}
    return Move(**{"total_s": total_s, "peak_bytes": 1 << 30, **numbers, **changed})


def by_measure(comparisons):
    return {line.measure: line for line in comparisons}


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_the_ratio_is_to_the_better_one_of_the_same_repetition():
    rows = [(move(1.0), move(4.0), move(2.0)), (move(2.0), move(5.0), move(8.0)), (move(9.0), move(10.0), move(30.0))]
    total = by_measure(compare(rows, HALF))["total time"]
    assert (total.ratio.median, total.ratio.low, total.ratio.high) == (0.5, 0.4, 0.9)
    assert [spread.median for spread in total.spreads] == [2.0, 5.0, 8.0]
    assert total.met is True
    assert by_measure(compare(rows, Targets(total=0.49, downtime=0.5, cpu=0.5)))["total time"].met is False


def test_a_move_that_did_not_come_about_is_not_a_number():
    rows = [(move(1.0), None, move(4.0)), (None, move(2.0), move(2.0)), (move(3.0), None, None)]
    total = by_measure(compare(rows, HALF))["total time"]
    assert total.ratio.median == 0.25
    assert [spread.median for spread in total.spreads] == [2.0, 2.0, 3.0]
    nothing = by_measure(compare([(None, None, None)], HALF))["total time"]
    assert (nothing.ratio, nothing.met, nothing.spreads) == (None, None, (None, None, None))


def test_verification_is_a_share_of_our_own_time():
    rows = [(move(2.0, verify_s=0.3, downtime_s=0.4), move(1.0), move(1.0))]
    shares = by_measure(compare(rows, HALF))
    total, downtime = shares["verification, share of total time"], shares["verification, share of downtime"]
    assert (total.ratio.median, total.met) == (0.15, True)
    assert total.cells == ("15.0% (15.0% to 15.0%)", "-", "-")
    assert downtime.cells == ("75.0% (75.0% to 75.0%)", "-", "-")
    assert downtime.met is None


def test_the_table_has_a_verdict_where_there_is_a_target():
    rows = [(move(1.0, gap_s=0.2), move(4.0, gap_s=0.1), None)]
    text = f"{header(['a', 'b', 'c'])}\n{lines('the guest', rows, compare(rows, HALF))}"
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert len({len(cells) for cells in table}) == 1
    assert table[0][2:5] == ["a", "b", "c"]
    assert table[2] == ["the guest", "moved", "1 of 1", "1 of 1", "0 of 1", "", "", ""]
    verdicts = {cells[1]: cells[5:] for cells in table}
    assert verdicts["total time"] == ["0.25 (0.25 to 0.25)", "0.5", "met"]
    assert verdicts["downtime, at the guest"] == ["2.00 (2.00 to 2.00)", "0.5", "missed"]
    assert verdicts["sent"][1:] == ["", ""]


def test_a_host_is_named_by_cpu_kernel_and_kvm(tmp_path):
    for module, parameter, value in (("kvm_amd", "npt", "1"), ("kvm_intel", "ept", "N"), ("kvm_other", "ept", "Y")):
        (tmp_path / module / "parameters").mkdir(parents=True)
        (tmp_path / module / "parameters" / parameter).write_text(f"{value}\n")
    (tmp_path / "kvm").mkdir()
    cpu, _, rest = host_line(tmp_path).partition("; ")
    assert cpu == str(host_cpu(keeps_cpuid=True) or "unknown CPU")
    assert rest == (
        f"{os.cpu_count()} CPUs; Linux {os.uname().release}; "
        "kvm_amd with nested paging, kvm_intel with shadow paging, kvm_other with shadow paging"
    )
    assert host_line(tmp_path / "kvm").endswith("; no KVM module")


def test_growth_says_which_sizes_keep_up_with_a_copy():
    one = {"median": 1, "low": 1, "high": 1}
    numbers = {"total_s": one, "gap_s": one, "verify_s": one, "cpu_s": one, "peak_bytes": one}
    sizes = [
        {"memory_bytes": size, **numbers, "of_a_copy": {"median": ratio, "low": ratio, "high": ratio}}
        for size, ratio in ((256 * MIB, 0.8), (512 * MIB, 0.79))
    ]
    first, second = growth_table(sizes).splitlines()[-2:]
    assert first.startswith("| 256 MiB |")
    assert first.endswith("| 0.8 | met |")
    assert second.endswith("| 0.8 | missed |")
    assert Spread.of([]) is None


def test_the_short_table_has_what_has_a_target():
    comparisons = compare([(move(1.0, gap_s=0.2), move(4.0), None)], HALF)
    table = f"{short_header()}\n{short_line('the guest', comparisons)}".splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert table[-1] == "| the guest | 0.25 (0.5: met) | 2.00 (0.5: missed) | 1.00 (0.5: missed) |"
    nothing = short_line("none", compare([(None, None, None)], HALF))
    assert nothing.count("- (0.5: not measured)") == 3


# -- two results -------------------------------------------------------------------------------------------------------


def result_of(path, host="a host", **ratios):
    lines = [
        {"measure": name, "ratio": ratio and dict(zip(("min", "median", "max"), ratio, strict=True))}
        for name, ratio in ratios.items()
    ]
    path.write_text(json.dumps({"host": host, "results": [{"scenario": "busy", "comparisons": lines}, {"sizes": []}]}))
    return str(path)


def test_what_changed_by_more_than_the_noise_is_told_and_only_that(tmp_path, capsys):
    before = result_of(
        tmp_path / "1", total=(1.0, 1.1, 1.2), downtime=(0.5, 0.6, 0.7), cpu=(1.0, 1.0, 1.0), only=(1, 1, 1), none=None
    )
    now = result_of(
        tmp_path / "2",
        total=(1.3, 1.4, 1.5),
        downtime=(0.2, 0.3, 0.4),
        cpu=(1.01, 1.05, 1.09),
        new=(1, 1, 1),
        none=None,
    )
    assert compare_results.main([before, now]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "worse: busy: total: 1.10 before, 1.40 now",
        "better: busy: downtime: 0.60 before, 0.30 now",
    ]
    assert said.err == ""
    assert compare_results.main([now, result_of(tmp_path / "3", host="another", total=(1.2, 1.9, 2.0))]) == 0
    said = capsys.readouterr()
    assert said.out == "no ratio changed by more than the noise\n"
    assert said.err == "two hosts: a host\n           another\n"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": [{"comparisons": [{}]}]}', '{"results": 3}'])
def test_what_is_no_result_is_refused(tmp_path, capsys, content):
    (tmp_path / "x").write_text(content)
    with pytest.raises(SystemExit) as caught:
        compare_results.main([str(tmp_path / "x"), str(tmp_path / "x")])
    assert caught.value.code == 2
    assert "is no result of vs_qemu.py --json" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------------------------------


def test_without_qemu_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert vs_qemu.main(["busy"]) == 5
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "vs_qemu: QEMU is not installed; apt install qemu-system-x86\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonesuch"],
        ["growth", "--quick"],
        ["busy", "--pairs", "0"],
        ["--pairs", "many"],
        ["--set", "x-verify"],
        ["--downtime-limit", "nan"],
    ],
)
def test_wrong_usage_is_refused_before_anything_is_started(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        vs_qemu.main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def pretended(moved, **more):
    """Return a bench on which a move is what ``moved(monitor, load, warm=...)`` says."""
    return partial(vs_qemu.Bench, move=moved, qemu_shim=lambda folder: b"", **more)


def test_arguments_of_migrate_are_passed_on_and_shown(capsys):
    seen = []
    bench = pretended(lambda monitor, load, warm: seen.append(monitor) or move(1.0))
    options = ["--set", "x-verify=audit", "--set", "x-connections=2", "--json", "--downtime-limit", "30"]
    assert vs_qemu.main(["hot", "--pairs", "1", *options], bench) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["monitors"][0] == "pageferry, x-verify=audit, x-connections=2"
    assert seen[0].policy == "converge"
    assert dict(seen[0].options) == {"x-verify": "audit", "x-connections": 2}
    assert [monitor.channels for monitor in seen[1:3]] == [None, 2]
    assert {monitor.limit_s for monitor in seen} == {0.03}


def test_warm_memory_is_in_use_until_it_is_given_back():
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    with WarmMemory(lambda: (1 << 30) + 4 * 64 * MIB - 1) as warm:
        warm.hold()
        assert warm.held_bytes == 3 * 64 * MIB
        assert resident_bytes() - before > 170 * MIB
        warm.give_back(65 * MIB)
        assert warm.held_bytes == 64 * MIB
        assert resident_bytes() - before < 100 * MIB
    assert warm.held_bytes == 0


def test_what_is_free_is_read_from_the_kernel(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemFree:    7 kB\nMemAvailable: 50 kB\n")
    assert free_bytes(meminfo) == 7 << 10
    assert free_bytes() > 0


@pytest.mark.parametrize(("flags", "warm"), [([], True), (["--cold"], False)])
def test_memory_is_warm_where_it_is_not_to_be_cold(capsys, flags, warm):
    seen = []
    bench = pretended(lambda monitor, load, warm: seen.append(warm is not None) or move(1.0))
    assert vs_qemu.main(["idle", "--pairs", "1", *flags], bench) == 0
    assert set(seen) == {warm}
    assert "| total time |" in capsys.readouterr().out


def test_quick_is_what_the_readme_shows_without_a_warm_up(capsys):
    seen = []
    bench = pretended(lambda monitor, load, warm: seen.append(monitor.name) or move(1.0))
    assert vs_qemu.main(["--quick"], bench) == 0
    assert len(seen) == 2 * 3 * len(vs_qemu.SCENARIOS)
    table, title = capsys.readouterr().out.splitlines()[2:], vs_qemu.SCENARIOS["busy"].title
    assert len(table) == 2 + len(vs_qemu.SCENARIOS)
    assert table[2] == f"| {title} | 1.00 (0.9: missed) | 1.00 (0.25: missed) | 1.00 (1: met) |"


def test_cold_memory_has_targets_of_its_own(capsys):
    bench = pretended(lambda monitor, load, warm: move(1.0))
    assert vs_qemu.main(["busy", "--quick", "--cold"], bench) == 0
    assert "| 1.00 (0.5: missed) | 1.00 (0.5: missed) | 1.00 (0.6: missed) |" in capsys.readouterr().out


def test_the_warm_up_is_not_counted_and_a_failure_is_told(capsys):
    made = iter([move(100.0), move(100.0), move(100.0), move(1.0), VmError("it stood still"), move(4.0)])

    def attempt(monitor, load, warm):
        made_now = next(made)
        if isinstance(made_now, VmError):
            raise made_now
        return made_now

    assert vs_qemu.main(["busy", "--pairs", "1"], pretended(attempt)) == 0
    said = capsys.readouterr()
    assert "| total time | 1.00 s (1.00 s to 1.00 s) | - | 4.00 s (4.00 s to 4.00 s) | 0.25" in said.out
    assert "| moved | 1 of 1 | 0 of 1 | 1 of 1 |" in said.out
    assert "  QEMU: it stood still" in said.err


def test_scenarios_are_lines_of_one_table_and_growth_is_another(capsys):
    bench = pretended(
        lambda monitor, load, warm: move(1.0, verify_s=0.1),
        plain_copy=lambda size_bytes, warm: 0.5,
        available_bytes=lambda: 2 << 30,
    )
    assert vs_qemu.main(["growth", "idle", "busy", "--pairs", "1"], bench) == 0
    said = capsys.readouterr()
    host, table, growth = said.out.split("\n\n", 2)
    assert host == f"Host: {host_line()}"
    assert [line.split("|")[1].strip() for line in table.splitlines() if "moved" in line] == [
        vs_qemu.SCENARIOS[name].title for name in ("busy", "idle")
    ]
    assert table.count("---") == 8
    assert growth.count(" missed |") == 2
    assert "1 GiB: left out, this host has 2 GiB available" in said.err


# -- measured from outside ---------------------------------------------------------------------------------------------


class OwnMemory:
    """A peer whose guest memory is a buffer of this very process."""

    def __init__(self, name="peer"):
        self.name = name
        self.page = ctypes.create_string_buffer(4096)
        self.there = True

    def hva(self, gpa):
        assert gpa == abi.STATUS_GPA
        return ctypes.addressof(self.page) if self.there else None

    def memory_file(self):
        return Path("/proc/self/mem")

    def last_words(self):
        return "that was all"

    def says(self, **fields):
        offsets = {"work": 0, "error": 0x18, "passes": 0x40}
        for name, value in fields.items():
            struct.pack_into("<Q", self.page, offsets[name], value)


def test_the_guests_own_count_is_read_out_of_another_process():
    peer = OwnMemory()
    peer.says(work=77, error=3, passes=5)
    count = read_count(peer)
    assert (count.work, count.error, count.passes) == (77, 3, 5)
    peer.there = False
    assert read_count(peer) is None


def test_a_page_that_is_only_copied_is_not_a_running_guest():
    source, destination = OwnMemory(), OwnMemory()
    source.says(work=100)
    with GuestWatch(source, destination) as watch:
        destination.says(work=100)
        with pytest.raises(VmError, match="does not work"):
            watch.wait_moved(time.monotonic() + 0.05)
        source.says(work=200)
        destination.says(work=201)
        watch.wait_moved(time.monotonic() + 60)
    assert watch.first_at_destination_s > 0
    assert watch.gap_s >= 0


def test_a_destination_whose_memory_appears_later_is_found():
    source, destination = OwnMemory(), OwnMemory()
    source.says(work=1)
    destination.there = False
    with GuestWatch(source, destination) as watch:
        destination.says(work=2)
        destination.there = True
        watch.wait_moved(time.monotonic() + 60)


def test_a_guest_that_does_not_fill_its_memory_is_told():
    with pytest.raises(VmError, match="did not fill its memory in time: that was all"):
        wait_filled(OwnMemory(), time.monotonic())


def test_a_process_that_does_not_start_is_told_with_its_last_words(tmp_path):
    program = [sys.executable, "-c", "print('no such thing here'); raise SystemExit(1)"]
    with PageferryPeer("mine", program, tmp_path, 8 << 20) as peer:
        with pytest.raises(VmError, match=r"mine was not started"):
            peer.cpu_s()
        with pytest.raises(VmError, match=r"mine did not start: no such thing here"):
            peer.start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_the_middle_of_starting_a_process_leaves_none(tmp_path, monkeypatch, number):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)
            signal.raise_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    peer = PageferryPeer("mine", [sys.executable, "-c", "import time; time.sleep(600)"], tmp_path, 8 << 20)
    with pytest.raises(KeyboardInterrupt), peer:
        peer.start()
    assert started[0].poll() == -signal.SIGTERM


@pytest.fixture
def guest_process(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pageferry",
        "run",
        PROGRAM,
        "--accel",
        "kvm",
        "--memory",
        "14M",
    ]  # no stack is as large
    command += ["--working-set", "16K", "--argument", "12K", "--argument", "7"]
    return PageferryPeer("source", command, tmp_path, 14 << 20)


@pytest.mark.kvm
def test_a_guest_process_is_measured_and_then_ended_by_its_id(guest_process, kvm_support):
    with guest_process as peer:
        peer.start()
        wait_filled(peer, time.monotonic() + 60)
        with peer.memory_file().open("rb", buffering=0) as file:
            file.seek(peer.hva(abi.INFO_GPA))
            info = struct.unpack("<28Q", file.read(28 * 8))
        assert (info[5], info[10], info[20:22]) == (16 << 10, 2, (12 << 10, 7))
        assert 0 < peer.vcpu_s() < peer.cpu_s()
        peer.reset_peak()
        assert peer.peak_bytes() > 16 * MIB
    assert guest_process._process.returncode is not None


# -- QEMU's image ------------------------------------------------------------------------------------------------------


def test_the_image_has_the_programs_very_bytes_and_what_the_abi_wants():
    shim = b"SHIM" * 4
    image = build_image(shim, LOAD)
    program = load_workload(PROGRAM)
    assert image.startswith(shim + struct.pack("<I", program.entry))
    parts, at = {}, len(shim) + 4
    while (size := struct.unpack_from("<2I", image, at)[1]) != 0:
        gpa = struct.unpack_from("<I", image, at)[0]
        parts[gpa] = image[at + 8 : at + 8 + 4 * size]
        at += 8 + 4 * size
    assert len(image) == at + 8
    assert parts.pop(abi.PAGE_TABLES_GPA) == abi.page_tables(LOAD.memory_bytes)
    info = struct.unpack_from("<28Q", parts.pop(abi.INFO_GPA))
    assert (info[2], info[4], info[5], info[20]) == (64 * MIB, 8 * MIB, 2 * MIB, 64 << 10)
    for segment in program.segments:
        assert parts.pop(segment.gpa)[: segment.size_bytes] == segment.data.ljust(segment.size_bytes, b"\0")
    assert not parts


def test_a_missing_assembler_is_told(monkeypatch, tmp_path):
    (tmp_path / QEMU).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="needed for QEMU's guest image") as caught:
        qemu_shim(Path("/nonexistent"))
    assert caught.value.hint == "apt install binutils"


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    try:
        return qemu_shim(tmp_path_factory.mktemp("shim"))
    except UnsupportedError as error:
        pytest.skip(str(error))


def run_in_qemu(load, shim, folder):
    image = folder / "guest.bin"
    image.write_bytes(build_image(shim, load))
    command = [QEMU, "-accel", "tcg", "-m", f"{load.memory_bytes // MIB}M", "-kernel", str(image), "-display", "none"]
    return QemuPeer("qemu", [*command, "-nodefaults", "-serial", "stdio"], folder)


@pytest.mark.parametrize("rewritten_bytes", [LOAD.rewritten_bytes, 0])
def test_qemu_runs_the_program_and_gives_it_a_clock(rewritten_bytes, shim, tmp_path):
    load = Load(memory_bytes=64 * MIB, filled_bytes=2 * MIB, rewritten_bytes=rewritten_bytes)
    with run_in_qemu(load, shim, tmp_path) as peer:
        peer.start()
        wait_filled(peer, time.monotonic() + 120)
        deadline_s = time.monotonic() + 120
        while read_count(peer).work < 512 + 100 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        count = read_count(peer)
        assert count.work >= 512 + 100
        assert count.error == 0
        assert "rewrite: 512 pages, rate 0/s, seed 1" in peer.last_words()
        assert peer.vcpu_s() > 0


@pytest.mark.kvm
def test_every_process_ends_when_the_benchmark_is_interrupted(shim, kvm_support):
    script = Path(vs_qemu.__file__)
    running = subprocess.Popen([sys.executable, script, "idle", "--pairs", "1"], stderr=subprocess.PIPE, text=True)
    assert "warm-up" in running.stderr.readline()
    children = Path("/proc", str(running.pid), "task", str(running.pid), "children")
    while not (started := children.read_text().split()):
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert said.endswith("vs_qemu: interrupted; what was started is ended\n")
    deadline_s = time.monotonic() + 60
    while any(lives(child) for child in started):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def lives(pid):
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
