"""Pause and freeze of all vCPUs come to an end whatever these are doing, on both machines, by one thread or by many.

Nothing here asserts a time. Each program would go on for hours if it were not interrupted, so a stop that waits for the
guest does not come back at all, and that is what fails.
"""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from altered import alter
from tiers import sample

from pageferry.core.errors import VmError
from pageferry.core.run import Wait
from pageferry.core.state import MachineState
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.devices.clock import Clock
from pageferry.devices.dma import DMA_MMIO
from pageferry.guests import abi
from pageferry.guests.abi import read_status

PATIENCE_S = 60
PROGRAM, COUNTERS, BUFFER = 0x10_0000, 0x20_0000, 0x40_0000
MEMORY = 16 << 20

#: r15 is the vCPU's counter, which each program raises at least once; rsi a buffer of 8 MiB that all share.
PROGRAMS = {
    # inc qword [r15]; 1: inc rbx; jmp 1b
    "spin": "49ff0748ffc3ebfb",
    # 1: inc qword [r15]; jmp 1b
    "count": "49ff07ebfb",
    # inc qword [r15]; 1: mov rdi, rsi; mov ecx, 8 MiB; rep stosb; jmp 1b
    "rep": "49ff074889f7b900008000f3aaebf4",
    # inc qword [r15]; 1: mov rax, [rdx]; mov [rdx], rax; jmp 1b: rdx is the DMA engine's first register
    "mmio": "49ff07488b02488902ebf8",
    # inc qword [r15]; 1: in eax, clock; jmp 1b
    "port": "49ff07e5f0ebfc",
    # inc qword [r15]; 1: mov eax, -1; out clock, eax; jmp 1b
    "wait": "49ff07b8ffffffffe7f0ebf7",
    # 1: inc qword [r15]; mov eax, 7; out sync, eax; jmp 1b
    "sync": "49ff07b807000000e7ecebf4",
    # inc qword [r15]; 1: xor eax, eax; out invalidate, eax; jmp 1b
    "flush": "49ff0731c0e7e8ebfa",
}


@pytest.fixture
def start(make_vm):
    """Makes a running guest with one vCPU for each of the programs named."""
    made = []

    def start(*programs):
        vm = make_vm(VmConfig(memory_bytes=MEMORY, cpus=len(programs)))
        made.append(vm)
        (clock,) = [device for device in vm.platform.bus.devices if isinstance(device, Clock)]
        alter(clock, "write", lambda _: lambda offset, size, value: Wait(100 * PATIENCE_S))
        vm.memory.write(abi.PAGE_TABLES_GPA, abi.page_tables(MEMORY))
        states = []
        for index, name in enumerate(programs):
            rip = PROGRAM + index * 0x1000
            vm.memory.write(rip, bytes.fromhex(PROGRAMS[name]))
            state = dataclasses.replace(abi.entry_state(rip, index), rsi=BUFFER, rdx=DMA_MMIO, r15=counter(index))
            states.append(state)
        vm.load_state(MachineState(vcpus=tuple(states), devices=vm.save_state().devices))
        vm.attach_sync(True)
        vm.resume()
        return vm

    yield start
    for vm in made:
        vm.close()


def counter(index):
    return COUNTERS + index * 0x1000


def counters(vm):
    return [vm.memory.read_u64(counter(index)) for index in range(vm.config.cpus)]


def ends(action):
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def until(condition):
    pause = threading.Event()
    for _ in range(PATIENCE_S * 1000):
        if condition():
            return True
        pause.wait(0.001)
    return False


def stands_still(vm):
    """Registers and counters are those of an instruction boundary, and stay."""

    def picture():
        return [(v.rip, v.rbx, v.rcx, v.rdi) for v in vm.save_state().vcpus], counters(vm)

    before = picture()
    return all(picture() == before for _ in range(3))


@pytest.mark.parametrize("cpus", sample([1, 2, 8], "more vCPUs than a host has cores include fewer", quick=[8]))
@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "sync"])
def test_every_vcpu_stops(start, program, cpus):
    vm = start(*[program] * cpus)
    assert until(lambda: all(counters(vm)))  # each has come to its loop
    for _ in range(10):
        assert ends(vm.pause)
        assert vm.status is VmStatus.PAUSED
        assert stands_still(vm)
        vm.resume()
        assert ends(vm.freeze)
        assert vm.status is VmStatus.RUNNING
        assert stands_still(vm)
        vm.thaw()


@pytest.mark.parametrize("other", [name for name in PROGRAMS if name != "sync"])
def test_a_sync_point_of_one_stops_the_others_in_the_midst_of_theirs(start, other):
    vm = start("sync", other, other)
    for number in range(1, 11):
        assert ends(lambda: vm.wait(PATIENCE_S))
        assert (vm.status, vm.sync_value()) == (VmStatus.PAUSED, 7)
        assert vm.memory.read_u64(counter(0)) == number
        assert stands_still(vm)
        assert ends(vm.pause)  # paused twice is paused
        assert ends(vm.freeze)
        vm.thaw()
        vm.resume()


def test_they_stop_whatever_each_of_them_does(start):
    names = [*PROGRAMS]
    names.remove("sync")
    vm = start(*names)
    assert until(lambda: all(counters(vm)))
    for _ in range(20):
        assert ends(vm.pause)
        assert stands_still(vm)
        vm.resume()
    assert ends(vm.close)


@pytest.mark.parametrize("program", ["spin", "rep", "mmio", "wait"])
def test_a_stop_that_comes_before_they_have_begun(start, program):
    for _ in range(5):
        vm = start(*[program] * 4)
        assert ends(vm.pause)
        assert stands_still(vm)
        assert ends(vm.close)


STORM = 40


def test_pauses_freezes_and_cleans_from_many_threads(start):
    """While a thread holds a freeze no vCPU runs, even if another thread resumes; when all are done the guest runs
    on."""
    vm = start("count", "count", "mmio", "flush")
    assert until(lambda: all(counters(vm)))
    vm.log_dirty.enable()

    def freeze():
        for _ in range(STORM):
            vm.freeze()
            assert vm.run_control.held
            assert stands_still(vm)
            vm.thaw()

    def pause():
        for _ in range(STORM):
            vm.pause()
            vm.resume()

    def clean():
        for _ in range(STORM):
            vm.log_dirty.clean()

    with ThreadPoolExecutor(7) as pool:
        storms = [pool.submit(action) for action in (freeze, freeze, freeze, pause, pause, clean, clean)]
        for storm in storms:
            storm.result(3 * PATIENCE_S)
    with pytest.raises(VmError, match="not frozen"):
        vm.thaw()
    vm.resume()
    before = counters(vm)
    assert until(lambda: all(now > then for now, then in zip(counters(vm)[:2], before[:2], strict=True)))


@pytest.mark.parametrize("cpus", sample([2, 8], "two include no less of it", quick=[2]))
def test_vcpus_that_share_memory_find_nothing_wrong_after_a_storm(guests, cpus):
    vm = guests("smp", cpus=cpus)
    vm.resume()

    def progress():
        before = [slot.checks for slot in read_status(vm.memory, cpus)]

        def all_checked_more():
            assert vm.end is None, (vm.end, read_status(vm.memory, cpus))
            return all(s.checks > b for s, b in zip(read_status(vm.memory, cpus), before, strict=True))

        return until(all_checked_more)

    assert progress()

    def stop_and_go():
        for _ in range(STORM):
            vm.freeze()
            vm.thaw()
            vm.pause()
            vm.resume()

    with ThreadPoolExecutor(3) as pool:
        for storm in [pool.submit(stop_and_go) for _ in range(3)]:
            storm.result(3 * PATIENCE_S)
    vm.resume()
    assert progress()
