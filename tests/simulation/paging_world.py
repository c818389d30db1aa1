"""The world for :mod:`.interleave`: a real domain whose vCPUs, device and operators take their steps one at a time.

Real are the P2M, the paging code with its bitmap, journal and locks, the nested fault handler, the log-dirty
operations, guest memory with its marks, and of the vCPU everything but the emulator: flush before entry, nested walk,
kick. Stand-ins are the emulator (:class:`_ModelCpu`: a TLB, and a program that is a list of stores), the guest's page
tables (gva = gpa) and the run control (a gate: a held vCPU does not enter, and who holds waits until all are outside).

The operator thread is a migration in miniature: ENABLE, copy everything, CLEAN and copy what it reported, again, then
with the guest held a last CLEAN and copy. The copy must equal memory then.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SHIFT, GfnArray
from pageferry.core.run import GuestExit
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.cpu import SoftVcpu
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.p2m_types import P2MType
from simulation.interleave import ScheduledLock, Violated, note, step

#: Two pages under one superpage: the first write splits it.
PAGES = (0x201, 0x202)
_WRITE = 2


class _Gate:
    """Stands in for the run control."""

    def __init__(self, vcpus: Sequence[SoftVcpu]) -> None:
        self._vcpus = vcpus
        self.inside = [False] * len(vcpus)
        self.stops = 0

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stops += 1
        try:
            step("wait for vCPUs", self._all_outside)
            yield
        finally:
            self.stops -= 1

    def _all_outside(self) -> bool:
        for vcpu, inside in zip(self._vcpus, self.inside, strict=True):
            if inside:
                vcpu.kick()
        return not any(self.inside)

    def run(self, index: int) -> None:
        """A vCPU's thread: enter when no freeze holds it, until the program has ended."""
        ended = False
        while not ended:
            step("enter", lambda: not self.stops)
            self.inside[index] = True
            ended = isinstance(self._vcpus[index].run(), GuestExit)
            self.inside[index] = False


class _ModelCpu:
    """Stands in for the emulator: one store per slice, through a TLB."""

    def __init__(self, world: "PagingWorld", vcpu: SoftVcpu, program: Sequence[tuple[int, int]]) -> None:
        self._world = world
        self._vcpu = vcpu
        self.program = list(program)
        self.tlb: dict[int, tuple[int, bool]] = {}
        self.rip = 0
        self.cpu = SimpleNamespace(
            fields=SimpleNamespace(hflags=0, hflags2=0, eflags=0), events=SimpleNamespace(old_exception=-1)
        )
        self.out_of_blocks = True

    def run(self, blocks: int, *, interrupt: bool) -> int:
        if self.rip == len(self.program):
            ports = self._vcpu._ports
            ports._effect, ports._before = GuestExit(0), (0, 0)
            return 0
        gfn, value = self.program[self.rip]
        if not self.tlb.get(gfn, (0, False))[1]:
            maddr, permissions = self._vcpu._nested.translate(gfn << PAGE_SHIFT, True, False)
            step("fill the TLB")
            self.tlb[gfn] = maddr, bool(permissions & _WRITE)
        step("store")
        self._world.expect_writable(gfn)
        maddr = self.tlb[gfn][0]
        self._world.domain.machine.words[maddr >> 3] = value
        self.rip += 1
        return 0

    def ready(self) -> None:
        """One store per slice: no slice is ended early."""

    def hurry(self) -> None:
        """The same."""

    def flush_tlb(self) -> None:
        step("flush the TLB")
        self.tlb.clear()


class _IdentityWalker:
    """Stands in for the guest's page tables: gva = gpa, everything allowed."""

    def translate(self, gva: int, *, write: bool, fetch: bool) -> tuple[int, bool, bool]:
        return gva >> PAGE_SHIFT, True, True

    def flush(self) -> None:
        """No cache."""


class _SteppingWords:
    """Machine memory as the P2M sees it: each access to an entry is a step."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def __getitem__(self, at: int) -> int:
        step("read an entry")
        value = self._words[at]
        note(value)
        return value

    def __setitem__(self, at: int, value: int) -> None:
        step("write an entry")
        note(None)
        self._words[at] = value


class PagingWorld:
    """A domain of 2 MiB and a page, its vCPUs, a device and an operator.

    Args:
        programs: one per vCPU: the pages (indices into PAGES) that it stores to, in order.
        device: the pages that the device writes.
        cleans: how many CLEANs before the last one; None: no operators but ENABLE, before anything runs.
        fine: whether each access to an entry of the P2M is a step, not only each change of the table.
        break_it: changes the domain before anything runs: a fault to be found.
    """

    def __init__(
        self,
        *,
        programs: Sequence[Sequence[int]] = ((0, 1), (0,)),
        device: Sequence[int] = (),
        cleans: int | None = 1,
        fine: bool = False,
        break_it: Callable[[Domain], None] | None = None,
    ) -> None:
        self.domain = Domain(VmConfig(memory_bytes=(4 << 20), cpus=len(programs)))
        self._cleans = cleans
        self._device = device
        self._migrated = False
        self._raw_words = self.domain.machine.words
        self._gate = _Gate(self.domain.vcpus)
        self.domain.run_control = cast(Any, self._gate)
        self._cpus = [self._make_cpu(index, program) for index, program in enumerate(programs)]
        self._locks = {lock.rank.name: ScheduledLock(lock.rank.name) for lock in self.domain.locks}
        self._faults_before = 0
        self._ops_step()
        self.domain.memory.on_write(self._mark)
        if break_it is not None:
            break_it(self.domain)
        if cleans is None:
            self.domain.paging.enable()
        for lock in self.domain.locks:
            lock.instrument(self._locks.__getitem__)
        if fine:
            self.domain.p2m._words = cast(Any, _SteppingWords(self._raw_words))
        self._copy = self._contents()

    def _make_cpu(self, index: int, program: Sequence[int]) -> _ModelCpu:
        vcpu = self.domain.vcpus[index]
        stores = [(PAGES[page], 100 * (index + 1) + n) for n, page in enumerate(program)]
        cpu = _ModelCpu(self, vcpu, stores)
        vcpu._engine = cast(Any, cpu)
        vcpu._walker = vcpu._nested.walker = cast(Any, _IdentityWalker())
        return cpu

    def _ops_step(self) -> None:
        """Make a step before each change of the P2M, and count faults by cycle."""
        p2m, paging = self.domain.p2m, self.domain.paging

        def stepping(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*args: Any, **options: Any) -> Any:
                step(name)
                return change(*args, **options)

            return changed

        for name in ("change_found", "change_types", "change_entry_type_global"):
            setattr(p2m, name, stepping(name, getattr(p2m, name)))
        clean = paging._ops.clean

        def new_cycle(written: GfnArray) -> None:
            clean(written)
            self._faults_before = paging._fault_count

        paging._ops = dataclasses.replace(paging._ops, clean=new_cycle)

    def _mark(self, gfns: GfnArray) -> None:
        step("mark")
        self.domain.paging.mark(gfns)

    # --- the actors ---

    def actors(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Return the vCPUs, the device and the operator, as far as there are any."""
        actors: list[tuple[str, Callable[[], None]]] = [
            (f"vcpu{index}", partial(self._gate.run, index)) for index in range(len(self._cpus))
        ]
        self._device_done = not self._device
        if self._device:
            actors.append(("device", self._write))
        if self._cleans is not None:
            actors.append(("operator", self._migrate))
        return actors

    def _write(self) -> None:
        for number, page in enumerate(self._device):
            step("DMA")
            self.domain.memory.write((PAGES[page] << PAGE_SHIFT) + 8, (number + 1).to_bytes(8, "little"))
        self._device_done = True

    def _migrate(self) -> None:
        paging = self.domain.paging
        paging.enable()
        self._take(None)
        for _ in range(self._cleans or 0):
            self._take(paging.clean())
        step("device quiet", lambda: self._device_done)
        with self._gate.stopped():
            self._take(paging.clean())
            if self._copy != self._contents():
                raise Violated(f"law 2: a write was lost: copy {self._copy}, memory {self._contents()}")
            paging.off()
        self._migrated = True

    def _take(self, reported: DirtyBitmap | None) -> None:
        step("copy")
        now = self._contents()
        dirty = [reported is None or reported.test(gfn) for gfn in PAGES]
        self._copy = tuple(new if bit else old for bit, new, old in zip(dirty, now, self._copy, strict=True))

    def _contents(self) -> tuple[bytes, ...]:
        return tuple(self.domain.memory.read(gfn << PAGE_SHIFT, 16) for gfn in PAGES)

    # --- the laws ---

    def _type(self, gfn: int) -> int:
        p2m = self.domain.p2m
        words, p2m._words = p2m._words, self._raw_words
        try:
            return p2m.lookup(gfn)[1]
        finally:
            p2m._words = words

    def expect_writable(self, gfn: int) -> None:
        """Law 2: a store goes through a translation that the P2M still grants."""
        if self._type(gfn) != P2MType.RAM_RW:
            raise Violated(f"law 2: a store to gfn {gfn:#x} through a stale TLB entry")

    def check(self) -> None:
        """Laws 1 and 8."""
        paging = self.domain.paging
        if not paging.enabled:
            return
        faults = paging._fault_count - self._faults_before
        if faults > len(PAGES):
            raise Violated(f"law 8: {faults} faults for {len(PAGES)} pages in one cycle")
        if self._locks["P2M"].held or self._locks["LOG_DIRTY"].held:
            return  # in the middle of a change: no other thread can look
        dirty = paging.are_dirty(np.array(PAGES, np.uint64))
        for gfn, bit in zip(PAGES, dirty.tolist(), strict=True):
            if self._type(gfn) == P2MType.RAM_RW and not bit:
                raise Violated(f"law 1: gfn {gfn:#x} is writable and clean")

    # --- for the scheduler ---

    def finished(self) -> bool:
        """After OFF there is nothing to lose."""
        return self._migrated

    def fingerprint(self) -> Hashable:
        """Return P2M, bitmap, journal, counters, TLBs, memory, locks and gate."""
        domain, paging = self.domain, self.domain.paging
        pool = domain.machine.pool
        return (
            pool.tables[: pool.used].tobytes(),
            domain.p2m.global_logdirty,
            None if paging._bitmap is None else paging._bitmap.words.tobytes(),
            paging._journal.tobytes(),
            (paging._fault_count - self._faults_before, paging._failed_allocations),
            tuple((cpu.rip, tuple(sorted(cpu.tlb.items()))) for cpu in self._cpus),
            tuple((vcpu._kicked, vcpu.tlb.flush_wanted, tuple(vcpu.tlb.protected)) for vcpu in domain.vcpus),
            self._contents(),
            self._copy,
            tuple(lock.held for lock in self._locks.values()),
            (tuple(self._gate.inside), self._gate.stops, self._device_done),
        )

    def close(self) -> None:
        """Free the domain."""
        for vcpu in self.domain.vcpus:
            vcpu.close()
        self.domain.machine.close()
