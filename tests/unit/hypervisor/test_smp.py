"""Several vCPUs on the software hypervisor; and marks from every place that needs them, whatever locks are held."""

import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from ring0 import BASE, assemble
from soft import access

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import MachineState
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.devices import dma
from pageferry.guests.abi import PAGE_TABLES_GPA, PROGRAM_BASE, entry_state, page_tables, read_status
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.locks import LockOrderError

MiB = 1 << 20
PAGE = 4096
PATIENCE_S = 20


@pytest.fixture
def domains():
    made = []

    def make(cpus=1, workload=None, **params):
        domain = Domain(VmConfig(memory_bytes=8 * MiB, cpus=cpus))
        made.append(domain)
        if workload is not None:
            boot(domain, load_workload(workload), params=GuestParams(**params))
            domain.resume()
        return domain

    yield make
    for domain in made:
        domain.pause()
        invariants.check(domain)
        domain.close()


def in_thread(action):
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def joined(thread):
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def works(domain):
    """Wait until every vCPU has done more work."""
    before = read_status(domain.memory, domain.config.cpus)
    for _ in range(60_000):
        assert domain.wait(0.001) is VmStatus.RUNNING, (domain.end, read_status(domain.memory, domain.config.cpus))
        now = read_status(domain.memory, domain.config.cpus)
        if all(new.work > old.work for new, old in zip(now, before, strict=True)):
            return True
    return False


def pages(domain):
    return np.frombuffer(domain.memory.read(0, 8 * MiB), np.uint64).reshape(-1, 512)


@contextmanager
def clean_under_way(domain):
    """A thread is in CLEAN and waits for vCPUs that do not stop, until the block ends; yields a list for its bitmap."""
    waiting, go, bitmaps = threading.Event(), threading.Event(), []

    @contextmanager
    def slow_hold():
        waiting.set()
        assert go.wait(PATIENCE_S)
        yield

    hold, domain.paging._hold = domain.paging._hold, slow_hold
    thread = in_thread(lambda: bitmaps.append(domain.paging.clean()))
    assert waiting.wait(PATIENCE_S)
    yield bitmaps
    go.set()
    assert joined(thread)
    domain.paging._hold = hold


def gfns(*numbers):
    return np.array(numbers, np.uint64)


def test_a_device_marks_while_clean_waits_for_vcpus(domains):
    """The order that would deadlock if CLEAN held the bitmap's lock, or the P2M's, while it waits."""
    domain = domains()
    domain.paging.enable()
    bus = domain.platform.bus
    with clean_under_way(domain) as bitmaps:
        bus.mmio_write(dma.DMA_MMIO + 0x08, 8, 5 * PAGE)
        bus.mmio_write(dma.DMA_MMIO + 0x10, 8, 2 * PAGE)
        writer = in_thread(lambda: bus.mmio_write(dma.DMA_MMIO + 0x28, 4, dma.COMMAND_FILL))
        assert joined(writer)
        assert bus.mmio_read(dma.DMA_MMIO + 0x2C, 4) == dma.STATUS_DONE
    assert bitmaps[0].gfns().tolist() == [5, 6]


def test_a_vcpu_faults_while_clean_waits_for_it(domains):
    domain = domains()
    domain.paging.enable()
    with clean_under_way(domain) as bitmaps:
        fault = in_thread(lambda: access(domain, 9, write=True))
        assert joined(fault)
    assert bitmaps[0].gfns().tolist() == [9]


def test_the_engine_marks_and_looks_while_clean_waits(domains):
    domain = domains()
    domain.paging.enable()
    with clean_under_way(domain) as bitmaps:
        assert joined(in_thread(lambda: domain.memory.write(7 * PAGE, b"x")))
        counts = []
        assert joined(in_thread(lambda: counts.append(domain.paging.stats().dirty_count)))
        assert counts == [1]
    assert bitmaps[0].gfns().tolist() == [7]


@pytest.mark.parametrize("outer", ["domain", "devices", "p2m", "paging"])
def test_a_mark_may_be_made_under_every_lock_but_its_own(domains, outer):
    domain = domains()
    domain.paging.enable()
    with getattr(domain.locks, outer):
        domain.paging.mark(gfns(3))
    assert domain.paging.peek().gfns().tolist() == [3]
    with domain.locks.log_dirty, pytest.raises(LockOrderError):
        domain.paging.mark(gfns(4))


@pytest.mark.parametrize("operator", ["enable", "peek", "clean", "off"])
def test_a_device_may_not_call_an_operator(domains, operator):
    """It would wait for the vCPU that is executing the access."""
    domain = domains()

    class Rude(dma.DmaDevice):
        mmio = range(dma.DMA_MMIO + 0x10_0000, dma.DMA_MMIO + 0x10_1000)

        def write(self, offset, size, value):
            getattr(domain.paging, operator)()

    bus = domain.platform.bus
    bus.add_regions(Rude(domain.memory))
    with pytest.raises(LockOrderError, match="DOMAIN lock taken while holding DEVICES"):
        bus.mmio_write(Rude.mmio.start, 8, 0)
    assert not domain.locks.devices.mine


def test_a_device_may_not_pause_the_guest_from_a_vcpus_thread(domains):
    domain = Domain(VmConfig(memory_bytes=8 * MiB))
    errors, asked = [], threading.Event()

    def sink(data):
        try:
            domain.pause()
        except VmError as error:
            errors.append(str(error))
        asked.set()

    domain.on_console(sink)
    boot(domain, load_workload("idle"))
    domain.resume()
    assert asked.wait(PATIENCE_S)
    domain.pause()
    domain.close()
    assert "cannot wait for itself" in errors[0]


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_a_pause_stops_every_vcpu_and_the_memory_with_it(domains, cpus):
    domain = domains(cpus, "sweep", working_set_bytes=64 * PAGE)
    for _ in range(5):
        assert works(domain)
        domain.pause()
        before = domain.memory.read(0, 8 * MiB)
        domain.save_state()
        assert domain.memory.read(0, 8 * MiB) == before
        domain.resume()


@pytest.mark.parametrize("cpus", [2, 4])
def test_vcpus_fault_on_the_same_pages_and_are_counted_once(domains, cpus):
    """All vCPUs write the status page and share the program's: each such page is one fault in a cycle."""
    domain = domains(cpus, "smp", working_set_bytes=64 * PAGE)
    assert works(domain)
    domain.paging.enable()
    for _ in range(20):
        assert works(domain)
        domain.freeze()
        before, dirty = domain.paging.stats().fault_count, domain.paging.peek()
        assert before - getattr(domain, "counted", 0) == dirty.count()
        domain.counted = before
        invariants.check(domain)
        domain.paging.clean()
        domain.thaw()
    assert read_status(domain.memory, cpus)[0].error == 0


def test_every_tlb_is_flushed_before_its_vcpu_runs_again(domains):
    domain = domains(4, "sweep", working_set_bytes=64 * PAGE)
    assert works(domain)
    domain.paging.enable()
    for _ in range(10):
        assert works(domain)
        domain.freeze()
        domain.paging.clean()
        before = pages(domain)
        domain.thaw()
        assert works(domain)
        domain.freeze()
        changed = np.flatnonzero((pages(domain) != before).any(axis=1)).tolist()
        reported = domain.paging.peek()
        assert set(changed) <= set(reported.gfns().tolist())
        assert changed
        domain.thaw()


@pytest.mark.parametrize("cpus", [0, Domain.MAX_VCPUS + 1])
def test_so_many_vcpus_are_refused(cpus):
    with pytest.raises(UnsupportedError, match="1 to 8 vCPUs"):
        Domain(VmConfig(memory_bytes=8 * MiB, cpus=cpus))


#: Each vCPU in its turn writes a function that returns the turn's number; then all of them call it. A slot of 64 bytes
#: says how far each has come.
TURNS = """
    .set FUNCTION, 0x400000
    .set TURN, 0x500000
    .set SLOTS, 0x600000
    .globl _start
    _start:                             # RSI: which vCPU
        xorl %ebx, %ebx
    1:  incl %ebx
        movl %ebx, %eax                 # whose turn
        xorl %edx, %edx
        movl $CPUS, %ecx
        divl %ecx
        cmpl %edx, %esi
        jne 3f
        xorl %edi, %edi
    2:  movl %edi, %eax                 # all have come as far as the turn before
        shll $6, %eax
        movl SLOTS(%rax), %eax
        incl %eax
        cmpl %ebx, %eax
        jb 2b
        incl %edi
        cmpl %ecx, %edi
        jne 2b
        movl %ebx, FUNCTION + 1
        movb $0xb8, FUNCTION            # mov $turn, %eax; ret
        movb $0xc3, FUNCTION + 5
        movl %ebx, TURN
    3:  cmpl %ebx, TURN
        jne 3b
        movl $FUNCTION, %eax
        cmpb $0xb8, (%rax)              # to read is not to fetch
        jne 4f
        call *%rax
        cmpl %ebx, %eax
        jne 4f
        movl %esi, %eax
        shll $6, %eax
        movl %ebx, SLOTS(%rax)
        cmpl $TURNS, %ebx
        jne 1b
        cmpl $0, %esi
        jne .                           # the first one ends the guest
        xorl %eax, %eax
        outl %eax, $0xf4
    4:  shll $16, %eax
        orl %ebx, %eax
        outl %eax, $0xf4
"""


@pytest.mark.parametrize(("cpus", "turns"), [(2, 60), (3, 20)])
def test_code_that_one_vcpu_writes_is_what_the_others_run(tmp_path, cpus, turns):
    assert PROGRAM_BASE == BASE
    code, _ = assemble(tmp_path, f".set CPUS, {cpus}\n.set TURNS, {turns}\n{TURNS}")
    domain = Domain(VmConfig(memory_bytes=8 * MiB, cpus=cpus))
    domain.memory.write(PAGE_TABLES_GPA, page_tables(4 << 30))
    domain.memory.write(PROGRAM_BASE, code)
    states = tuple(entry_state(PROGRAM_BASE, index) for index in range(cpus))
    domain.load_state(MachineState(vcpus=states, devices=domain.save_state().devices))
    domain.resume()
    assert domain.wait(120) is VmStatus.SHUTDOWN, domain.end
    assert domain.end.exit_code == 0, f"{domain.end.exit_code:#x}: what was called, and the turn"
    invariants.check(domain)
    domain.close()


LEFT_RUNNING = """
import sys
from pageferry.core.vm import VmConfig
from pageferry.guests.boot import boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain
domain = Domain(VmConfig(memory_bytes=8 << 20, cpus=2))
boot(domain, load_workload("sweep"))
domain.resume()
domain.wait(0.05)
print(domain.end)
sys.exit(7)
"""


def test_a_process_may_end_while_its_guest_runs():
    """Its exit code is the process's own: nothing is freed under a vCPU."""
    done = subprocess.run([sys.executable, "-c", LEFT_RUNNING], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (7, "None\n", "")
