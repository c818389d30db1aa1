"""The built-in guests do what docs/reference/guest-abi.md says, on every machine."""

import struct
import time
from dataclasses import replace
from functools import partial

import pytest
from altered import alter
from machines import KINDS
from tiers import sample

from pageferry.core.bitmap import expand_runs
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.devices.platform import InvalidatePort
from pageferry.guests import build
from pageferry.guests.abi import INFO_GPA, STATE_ENDED, STATE_RUNNING, read_status
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.elf import load_elf
from pageferry.guests.workloads import WORKLOADS, load_workload
from pageferry.hypervisor.domain import Domain
from pageferry.testing.oracle import StampOracle, working_set_gfns

MIB = 1 << 20
PAGE = 4096


QUICK = [kind for kind in KINDS if kind.name in ("kvm/kvm-bitmap", "soft/hap")]
pytestmark = pytest.mark.parametrize(
    "kind",
    sample(KINDS, "a guest sees nothing of trackers and paging modes", quick=QUICK),
    ids=str,
    indirect=True,
)


@pytest.fixture
def make_vm(kind):
    """Makes a machine of each kind from a VmConfig."""
    return kind.make_vm


@pytest.fixture
def start(make_vm):
    """Makes a running guest; returns its machine and what it was told."""
    made = []

    def start(program, *, memory_bytes=8 * MIB, cpus=1, sink=None, before=lambda vm: None, **params):
        vm = make_vm(VmConfig(memory_bytes=memory_bytes, cpus=cpus))
        made.append(vm)
        info = boot(vm, load_workload(program) if isinstance(program, str) else program, params=GuestParams(**params))
        vm.on_console(sink)
        before(vm)
        vm.resume()
        return vm, info

    yield start
    for vm in made:
        vm.close()


def slot(vm):
    return read_status(vm.memory, 1)[0]


def run_until(vm, condition):
    """Let the guest run until its status page fulfils a condition; it is running or has ended then."""
    for _ in range(60_000):
        if condition(slot(vm)) or vm.wait(0.001) is not VmStatus.RUNNING:
            break
    assert condition(slot(vm)), (vm.status, vm.end, slot(vm))


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_says_hello_and_works(start, name):
    console = bytearray()
    vm, _ = start(name, sink=console.extend, working_set_bytes=64 * PAGE, seed=5)
    run_until(vm, lambda status: status.work >= 20)
    vm.pause()
    assert console == f"{name}: 64 pages, rate 0/s, seed 5\n".encode()
    assert (vm.status, vm.end) == (VmStatus.PAUSED, None)
    assert (slot(vm).state, slot(vm).error) == (STATE_RUNNING, 0)


@pytest.mark.parametrize("name", ["sweep", "random", "hotset", "rewrite", "kv", "stamp", "smp", "dma", "pagetables"])
def test_a_workload_reaches_its_working_set_and_nothing_beside_it(start, name):
    at = (3 << 30) - 4 * PAGE
    vm, info = start(name, memory_bytes=(3 << 30) + 64 * PAGE, working_set_gpa=at, working_set_bytes=20 * PAGE)
    inside = working_set_gfns(info)
    run_until(vm, lambda status: status.work >= (200 if name == "dma" else 1000))
    vm.pause()
    touched = [gfn for gfn in inside.tolist() if any(vm.memory.read(gfn * PAGE, PAGE))]
    # dma stays on one side of the hole, and may not have hit its last page
    assert len(touched) == 20 if name != "dma" else touched[0] == 1 << 20
    beside = [at - PAGE, (4 << 30) + 16 * PAGE, (4 << 30) + 63 * PAGE]
    assert not any(any(vm.memory.read(gpa, PAGE)) for gpa in beside)


def test_sweep_writes_the_number_of_the_pass(start):
    vm, info = start("sweep", working_set_bytes=32 * PAGE)
    run_until(vm, lambda status: status.values[0] >= 10)
    vm.pause()
    marks = [vm.memory.read_u64(int(gfn) * PAGE) for gfn in working_set_gfns(info)]
    number = slot(vm).values[0]
    assert sorted(marks, reverse=True) == marks
    assert set(marks) <= {number, number - 1}


def test_hotset_prefers_its_first_tenth(start):
    vm, _ = start("hotset", working_set_bytes=100 * PAGE)
    run_until(vm, lambda status: status.work >= 5000)
    vm.pause()
    hot, cold = slot(vm).values[:2]
    assert 0.85 < hot / (hot + cold) < 0.95


def test_rewrite_writes_every_word_once_and_then_its_hot_part_for_ever(start):
    vm, info = start("rewrite", working_set_bytes=16 * PAGE, arguments=(4 * PAGE + 1,), seed=9)
    run_until(vm, lambda status: status.values[0] >= 1)
    vm.pause()
    begin, hot_end = info.working_set_gpa, info.working_set_gpa + 4 * PAGE
    hot, cold = vm.memory.read(begin, 4 * PAGE), vm.memory.read(hot_end, 12 * PAGE)
    words = struct.unpack(f"<{12 * PAGE // 8}Q", cold)
    assert len(set(words)) == len(words)
    vm.resume()
    passes = slot(vm).values[0]
    run_until(vm, lambda status: status.values[0] >= passes + 5)
    vm.pause()
    assert vm.memory.read(hot_end, 12 * PAGE) == cold
    first_words = struct.unpack("<4Q", b"".join(hot[at : at + 8] for at in range(0, 4 * PAGE, PAGE)))
    assert all(vm.memory.read_u64(begin + i * PAGE) != old for i, old in enumerate(first_words))
    assert slot(vm).checks >= 5 * 4


def test_rewrite_with_nothing_to_rewrite_waits(start):
    vm, info = start("rewrite", working_set_bytes=4 * PAGE)
    run_until(vm, lambda status: status.values[0] >= 1)
    before = vm.memory.read(info.working_set_gpa, 4 * PAGE)
    checks = slot(vm).checks
    run_until(vm, lambda status: status.checks >= checks + 8)
    vm.pause()
    assert vm.memory.read(info.working_set_gpa, 4 * PAGE) == before


@pytest.mark.parametrize("error", [1, 2])
@pytest.mark.parametrize("word", [0, PAGE // 8 - 1])
def test_rewrite_stops_at_a_page_that_is_not_as_it_was_left(start, error, word):
    vm, info = start("rewrite", working_set_bytes=8 * PAGE, arguments=(2 * PAGE,))
    run_until(vm, lambda status: status.values[0] >= 3)
    vm.pause()
    under_way = slot(vm).work % 2  # it may be half written: the other one of the two is not
    page = 5 if error == 2 else 1 - under_way
    vm.memory.write(info.working_set_gpa + page * PAGE + word * 8, bytes(8))
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert (vm.end.exit_code, slot(vm).error, slot(vm).detail[0]) == (error, error, page)


@pytest.mark.parametrize(("name", "rate"), [("sweep", 1000), ("sweep", 20000), ("idle", 100), ("kv", 1000)])
def test_a_rate_is_not_exceeded(start, name, rate):
    vm, _ = start(name, working_set_bytes=16 * PAGE, rate=rate)
    run_until(vm, lambda status: status.work >= 1)
    begun_s, before = time.monotonic(), slot(vm).work
    run_until(vm, lambda status: status.work >= before + rate // 20)
    done, elapsed_s = slot(vm).work - before, time.monotonic() - begun_s
    # Holds however slow this machine is: at most the elapsed time's operations, a batch, and 0.1 s of catching up.
    batch = max(1, rate // 500)
    assert done <= rate * (elapsed_s + 0.1) + 2 * batch


def test_kv_keeps_count_and_checks_all_pages(start):
    vm, _ = start("kv", working_set_bytes=6 * PAGE)
    run_until(vm, lambda status: status.values[4] >= 5)
    vm.pause()
    status = slot(vm)
    live, inserts, updates, deletes, _ = status.values[:5]
    assert min(inserts, updates, deletes) > 0
    assert status.checks >= 5 * 5
    assert abs(inserts - deletes - live) <= 1  # paused between two counters, perhaps


def test_kv_stops_when_a_page_is_older_than_the_rest(start):
    vm, info = start("kv", working_set_bytes=9 * PAGE)
    run_until(vm, lambda status: status.work >= 500)
    vm.pause()
    gpa = info.working_set_gpa + 4 * PAGE
    old, work = vm.memory.read(gpa, PAGE), slot(vm).work
    vm.resume()
    run_until(vm, lambda status: status.work >= work + 1000)
    vm.pause()
    assert vm.memory.read(gpa, PAGE) != old
    vm.memory.write(gpa, old)
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == slot(vm).error != 0
    assert slot(vm).state == STATE_ENDED


def test_kv_stops_when_one_bit_of_a_value_is_wrong(start):
    vm, info = start("kv", working_set_bytes=9 * PAGE)
    run_until(vm, lambda status: status.values[0] >= 200)
    vm.pause()
    # Flip a bit in the value of the live entries of half a page: an update may put one right, never all. The half that
    # begins the page is left out, since a delete before it may move an entry from there into the page before.
    gpa = info.working_set_gpa + 5 * PAGE
    for entry in range(gpa + PAGE // 2, gpa + PAGE, 32):
        if vm.memory.read_u64(entry):
            vm.memory.write(entry + 16, bytes([vm.memory.read(entry + 16, 1)[0] ^ 1]))
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == slot(vm).error == 1
    assert slot(vm).detail[0] == 4  # the page's number: the directory is page 0


def slots(vm):
    return read_status(vm.memory, vm.config.cpus)


@pytest.mark.parametrize(("cpus", "pages"), [(1, 4), (1, 20), (2, 8), (2, 64), (3, 37)])
def test_smp_vcpus_send_each_other_what_they_expect(start, cpus, pages):
    vm, _ = start("smp", cpus=cpus, working_set_bytes=pages * PAGE, seed=9)
    enough = 5 * 32 * pages  # several times round each ring
    run_until(vm, lambda _: all(status.values[1] >= enough for status in slots(vm)))
    vm.pause()
    assert [(status.state, status.error) for status in slots(vm)] == [(STATE_RUNNING, 0)] * cpus
    sent, received = (sum(status.values[i] for status in slots(vm)) for i in (0, 1))
    assert 0 <= sent - received <= 32 * pages + 2 * cpus


def test_smp_rests_where_the_rings_have_no_room(start):
    vm, _ = start("smp", cpus=2, working_set_bytes=7 * PAGE, rate=0)
    run_until(vm, lambda _: all(status.state == STATE_RUNNING for status in slots(vm)))
    vm.pause()
    assert [status.values[0] for status in slots(vm)] == [0, 0]


@pytest.mark.parametrize(
    ("page", "word", "error"), [(0, 0, 4), (0, 64, 4), (1, 0, 1), (2, 15, 2), (3, 5, 3)], ids=lambda value: str(value)
)
def test_smp_stops_when_one_page_of_a_ring_is_wrong(start, page, word, error):
    vm, info = start("smp", cpus=2, working_set_bytes=16 * PAGE)
    run_until(vm, lambda _: all(status.values[1] >= 1000 for status in slots(vm)))
    gpa = info.working_set_gpa + page * PAGE
    for _ in range(20):  # what was under way at the pause is written anew: try again then
        vm.pause()
        for at in [gpa + 8 * word] if page == 0 else range(gpa + 8 * word, gpa + PAGE, 128):
            vm.memory.write(at + 5, bytes([vm.memory.read(at + 5, 1)[0] ^ 1]))
        vm.resume()
        if vm.wait(1) is not VmStatus.RUNNING:
            break
    assert vm.status is VmStatus.SHUTDOWN
    assert vm.end.exit_code == error
    assert error in {status.error for status in slots(vm)}


def test_dma_stops_when_its_completion_count_is_wrong(start):
    vm, info = start("dma", working_set_bytes=9 * PAGE)
    run_until(vm, lambda status: status.checks >= 8)
    vm.pause()
    vm.memory.write(info.working_set_gpa, bytes(8))
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == slot(vm).error == 2


def typed(vm, data):
    """Type, as fast as the line takes it."""
    while data:
        data = data[vm.type_console(data) :]


def test_echo_answers_what_is_typed_also_more_than_the_receiver_holds(start):
    output = bytearray()
    vm, _ = start("echo", sink=output.extend)
    run_until(vm, lambda status: status.work >= 1)
    text = bytes(range(32, 127)) * 2
    typed(vm, b"hello\r" + text + b"\n" + b"\n")
    run_until(vm, lambda status: status.values[0] == 3 and output.endswith(b"3: \n"))
    vm.pause()
    assert output.split(b"\n")[1:] == [b"1: hello", b"2: " + text, b"3: ", b""]
    assert slot(vm).values[:2] == (3, 6 + len(text) + 2)


def test_echo_stops_when_the_receiver_overran(start):
    vm, _ = start("echo")
    run_until(vm, lambda status: status.work >= 10)
    vm.pause()
    vm.platform.console._overrun = True
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == slot(vm).error == 1


def test_no_input_is_taken_while_the_guest_is_frozen(start):
    vm, _ = start("echo")
    vm.freeze()
    saved = vm.save_state()
    assert vm.type_console(b"too late") == 0
    assert vm.save_state().devices[0] == saved.devices[0]
    vm.thaw()
    vm.pause()
    assert vm.type_console(b"in time\n") == 8
    vm.resume()
    run_until(vm, lambda status: status.values[0] == 1)


def altered(vm, **changes):
    """Pause, let the saved state of some devices be changed, each from what all were, go on."""
    vm.pause()
    change_saved(vm, **changes)
    vm.resume()


def change_saved(vm, **changes):
    state = vm.save_state()
    old = {each.name: each.data for each in state.devices}
    devices = [replace(each, data=changes.get(each.name, unchanged)(old, each.name)) for each in state.devices]
    vm.load_state(replace(state, devices=tuple(devices)))


def unchanged(old, name):
    return old[name]


def moved(offset, delta):
    """Return a change: add ``delta`` to the i64 at ``offset`` of a device's state."""

    def change(old, name):
        value = int.from_bytes(old[name][offset : offset + 8], "little", signed=True) + delta
        return old[name][:offset] + value.to_bytes(8, "little", signed=True) + old[name][offset + 8 :]

    return change


def longer_periods(old, name):
    return (3_600_000_000).to_bytes(4, "little") + old[name][4:]


def shorter_periods(old, name):
    return (900).to_bytes(4, "little") + old[name][4:]


#: So far, in microseconds, that no host is slow enough to make up for it before the guest looks again.
FAR = 1_000_000_000


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"clock": moved(0, -FAR), "timer": moved(4, -FAR)}, 1),  # the timer would not be loaded if it began later
        ({"clock": moved(0, 2**32 - FAR)}, 1),
        ({"timer": longer_periods}, 2),
        ({"timer": shorter_periods}, 3),
        ({"rtc": moved(2, -3600)}, 4),
    ],
    ids=["clock-back", "clock-far-ahead", "timer-back", "timer-ahead", "rtc-back"],
)
def test_timers_stops_when_a_clock_is_wrong(start, changes, error):
    vm, _ = start("timers", before=lambda vm: change_saved(vm, clock=moved(0, 2 * FAR)))
    run_until(vm, lambda status: status.values[0] > 300_000 and status.values[1] > 100)
    altered(vm, **changes)
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == slot(vm).error == error


def test_timers_stops_when_the_wall_clock_loses_time(start):
    vm, _ = start("timers")
    run_until(vm, lambda status: status.work >= 10)
    altered(vm, clock=moved(0, 10_000_000))
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == slot(vm).error == 5


def test_timers_does_not_mind_pauses_or_a_wall_clock_ahead(start):
    vm, _ = start("timers")
    run_until(vm, lambda status: status.work >= 50)
    for step in (0, 1, 100_000):
        altered(vm, rtc=moved(2, step))
        work = slot(vm).work
        run_until(vm, lambda status, work=work: status.work >= work + 50)
    assert slot(vm).error == 0


#: lea rdi, [0x180000]; mov ecx, 5; mov edx, 0x3f8; rep insb; lea rsi, [0x180000]; mov ecx, 5; rep outsb; exit 7
STRINGS = "488d3c2500001800b905000000baf8030000f36c488d342500001800b905000000f36eb007e6f4"


def test_string_instructions_work_on_the_uart(start):
    output = bytearray()
    vm, _ = start("idle", before=lambda vm: use_code(vm, STRINGS), sink=output.extend)
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == 7
    assert output == b"hello" == vm.memory.read(0x180000, 5)


def use_code(vm, code):
    """Have vCPU 0 begin with other code, and five bytes waiting for it."""
    vm.memory.write(0x190000, bytes.fromhex(code))
    state = vm.save_state()
    vm.load_state(replace(state, vcpus=(replace(state.vcpus[0], rip=0x190000), *state.vcpus[1:])))
    assert vm.type_console(b"hello") == 5


def test_a_guest_refuses_an_information_page_of_another_version(start):
    vm, _ = start("idle", before=lambda vm: vm.memory.write(INFO_GPA + 8, b"\2"))
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == 255


@pytest.mark.parametrize("seed", [1, 77])
def test_two_runs_of_stamp_leave_the_same_memory(start, seed):
    memories = []
    for _ in range(2):
        vm, info = start("stamp", before=lambda vm: vm.attach_sync(True), working_set_bytes=40 * PAGE, seed=seed)
        for number in (1, 2, 9):
            assert vm.wait(60) is VmStatus.PAUSED
            vm.reply_sync(number)
            vm.resume()
        assert vm.wait(60) is VmStatus.PAUSED
        memories.append(vm.memory.read(info.working_set_gpa, info.working_set_bytes))
    assert memories[0] == memories[1]
    assert any(memories[0])


@pytest.mark.exhaustive("all images are built anew, in seconds")
def test_a_fresh_build_behaves_as_its_image(start, tmp_path):
    cc = build.compiler()
    if cc is None:
        pytest.skip("no C compiler on this machine")
    build.build_all(tmp_path, cc)
    vm, info = start(
        load_elf(tmp_path / "stamp.elf"), before=lambda vm: vm.attach_sync(True), working_set_bytes=200 * PAGE
    )
    oracle = StampOracle(info)
    for number in (1, 2, 3):
        assert vm.wait(60) is VmStatus.PAUSED
        vm.reply_sync(number)
        vm.resume()
        oracle.played(number)
    assert vm.wait(60) is VmStatus.PAUSED
    assert oracle.wrong_gfns(vm.memory).size == 0
    for name in ("sweep", "random", "hotset", "kv", "dma", "idle", "pagetables"):
        vm, _ = start(load_elf(tmp_path / f"{name}.elf"), working_set_bytes=16 * PAGE)
        run_until(vm, lambda status: status.work >= 100)
        vm.pause()
        assert (vm.end, slot(vm).error) == (None, 0)


def test_pagetables_checks_itself_after_each_flush(start):
    vm, _ = start("pagetables", working_set_bytes=100 * PAGE)
    run_until(vm, lambda status: status.checks >= 2000)
    vm.pause()
    assert (vm.end, slot(vm).error) == (None, 0)
    assert slot(vm).work == slot(vm).checks
    assert abs(slot(vm).values[0] - 2 * slot(vm).work / 16) <= 2


def test_pagetables_stops_when_a_page_of_its_window_is_wrong(start):
    vm, info = start("pagetables", working_set_bytes=8 * PAGE)
    run_until(vm, lambda status: status.checks >= 500)
    vm.pause()
    vm.memory.write(info.working_set_gpa, bytes(info.working_set_bytes))
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == slot(vm).error in (1, 3, 4)


def test_pagetables_notices_a_flush_that_is_not_done(start):
    def flush_nothing(vm):
        (port,) = [device for device in vm.platform.bus.devices if isinstance(device, InvalidatePort)]
        alter(port, "write", lambda _: lambda offset, size, value: None)

    vm, _ = start("pagetables", working_set_bytes=100 * PAGE, before=flush_nothing)
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end.exit_code == slot(vm).error != 0


@pytest.mark.parametrize("program", ["pagetables", "kv", "timers"])
def test_a_guest_moves_from_any_machine_to_any_other(start, make_vm, program):
    vm, _ = start(program, working_set_bytes=50 * PAGE)
    others = [partial(Domain, paging_mode="shadow"), Domain, make_vm, partial(Domain, paging_mode="shadow")]
    for make in others:
        work = slot(vm).work
        run_until(vm, lambda status, work=work: status.work >= work + 300)
        vm.pause()
        other = make(vm.config)
        for gfn in expand_runs(*vm.memory.populated()).tolist():
            other.memory.write(gfn * PAGE, vm.memory.read(gfn * PAGE, PAGE))
        other.load_state(vm.save_state())
        vm.close()
        vm = other
        vm.resume()
    work = slot(vm).work
    run_until(vm, lambda status: status.work >= work + 300)
    assert slot(vm).error == 0
    vm.close()
