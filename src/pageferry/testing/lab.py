"""What the conformance checks are made of: a guest to experiment on, and a copy of it made of reported pages only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import numpy as np

from pageferry.core.bitmap import DirtyBitmap, expand_runs, runs_of
from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, PCI_HOLE_END, PCI_HOLE_START, GfnArray, gfn_of
from pageferry.core.machine import Machine
from pageferry.core.memory import GuestMemory
from pageferry.core.ram import RamRegion, ram_layout
from pageferry.core.vm import LOG_DIRTY_MEMBERS, LogDirty, VmConfig, VmStatus
from pageferry.guests import abi
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.elf import Program
from pageferry.guests.workloads import load_workload
from pageferry.testing.oracle import StampOracle, explained_gfns
from pageferry.testing.watchdog import Noted, Watch

MakeVm = Callable[[VmConfig], Machine]

GIVE_UP_S = 30.0
"""How long to wait for a guest, or another thread, that gets nowhere."""
PATIENCE_S = 60.0
"""How long a check may show no sign of life."""
_POLL_S = 0.001
_COMPARE_ALL_BYTES = 64 << 20
#: Densities of successive stamp rounds, in 256ths: a quarter, none, few, all, most.
_DENSITIES = (64, 0, 4, 256, 200)
STATUS_GFN = gfn_of(abi.STATUS_GPA)


class Violation(Exception):
    """A check found a promise broken; the runner adds the check's name and law."""


class Extra(Violation):
    """Frames are reported that were not written: a promise is broken, unless the host moved pages just then.

    Linux moves pages of a process to make room for huge ones. ``PAGEMAP_SCAN`` cannot protect a page that is being
    moved and was writable: it is writable again afterwards, and reported once more.
    """


class Unfit(Exception):
    """No check can run: the machine refuses to be made, or its tracker lacks something."""


def require(condition: bool, detail: str, kind: type[Violation] = Violation) -> None:
    """Raise a :class:`Violation`, of a kind, unless ``condition`` holds."""
    if not condition:
        raise kind(detail)


def listed(gfns: GfnArray) -> str:
    """Return a few of ``gfns`` and their number, for a message."""
    some = ", ".join(f"{gfn:#x}" for gfn in gfns[:4].tolist())
    return f"{gfns.size} frame(s): {some}{', ...' if gfns.size > 4 else ''}"


@dataclass(slots=True)
class Guest:
    """A booted guest. ``played`` are the stamp rounds since ``forget()``."""

    vm: Machine
    info: abi.GuestInfo
    program: Program
    oracle: StampOracle
    watch: Watch
    played: list[int] = field(default_factory=list)

    @property
    def log_dirty(self) -> LogDirty:
        """The tracker under test; a call that returns is a sign of life."""
        return cast(LogDirty, Noted(self.vm.log_dirty, self.watch))

    @property
    def memory(self) -> GuestMemory:
        """The guest's RAM."""
        return self.vm.memory

    def work(self) -> int:
        """Return how much work the guest has done."""
        return sum(slot.work for slot in abi.read_status(self.memory, self.info.cpus))

    def parts(self) -> list[range]:
        """Return ranges that cover all frames: cut within the working set, in front of the last word, at the hole."""
        limit = self.memory.gfn_limit
        within = (gfn_of(self.info.working_set_gpa) & -64) + 64
        cuts = {0, 64, within, (limit - 1) & -64, gfn_of(PCI_HOLE_START), gfn_of(PCI_HOLE_END)}
        edges = [*sorted(cut for cut in cuts if cut < limit), limit]
        return [range(start, stop) for start, stop in pairwise(edges)]

    def start_stamping(self) -> None:
        """Run the ``stamp`` guest to its first sync point."""
        self.vm.attach_sync(True)
        self.vm.resume()
        self._until_sync(0)

    def answer(self, number: int) -> None:
        """Give the guest, which is at a sync point, an answer, and let it run until it shows that at the next one."""
        self.vm.reply_sync(number)
        self.vm.resume()
        self._until_sync(number)

    def play(self, number: int) -> None:
        """Let the ``stamp`` guest, which is at a sync point, write round ``number``; it is at the next one then."""
        self.answer(number)
        self.played.append(number)
        self.oracle.played(number)

    def _until_sync(self, value: int) -> None:
        status = self.vm.wait(GIVE_UP_S)
        found = self.vm.sync_value() if status is VmStatus.PAUSED else None
        self.watch.signs += 1
        require(found == value, f"the guest did not reach sync point {value}: {status}, {self.vm.end}, value {found}")

    def progress(self, work: int = 1) -> None:
        """Wait until the running guest has done ``work`` more of its work."""
        wanted = self.work() + work
        for _ in range(int(GIVE_UP_S / _POLL_S)):
            self.require_running()
            self.watch.signs += 1
            if self.work() >= wanted:
                return
            self.vm.wait(_POLL_S)
        raise Violation("the guest makes no progress")

    def require_running(self) -> None:
        """Check that the guest runs, and has found nothing wrong with its memory."""
        slots = abi.read_status(self.memory, self.info.cpus)
        require(self.vm.status is VmStatus.RUNNING, f"the guest is {self.vm.status}: {self.vm.end}, {slots}")

    def require_exact(self, reported: DirtyBitmap, *, also: Sequence[int] = ()) -> None:
        """Check a bitmap against what the guest wrote in the rounds played, then forget them.

        Exactly those frames, the status page and ``also`` must be there; only frames that any running guest writes
        (see :func:`explained_gfns`) may be there too.
        """
        nbits = self.memory.gfn_limit
        require(reported.nbits == nbits, f"a bitmap has {reported.nbits} bits, not gfn_limit = {nbits}")
        must = DirtyBitmap.of(nbits, np.array(also, np.uint64))
        for number in self.played:
            must.set(self.oracle.written(number))
            must.set(STATUS_GFN)
        missing = (must - reported).gfns()
        require(not missing.size, f"written in round(s) {self.played} but not reported: {listed(missing)}")
        extra = (reported - must - DirtyBitmap.of(nbits, explained_gfns(self.info, self.program))).gfns()
        require(not extra.size, f"reported in round(s) {self.played} but not written: {listed(extra)}", Extra)
        self.played.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """Makes guests of one size and seed on the machine under test.

    ``patience_s``: how long a check may do nothing before it is given up.
    """

    make_vm: MakeVm
    memory_bytes: int
    seed: int
    cpus: int = 1
    patience_s: float = PATIENCE_S
    watch: Watch = field(default_factory=Watch)

    @contextmanager
    def guest(self, workload: str | Program, *, pages: int = 96, rate: int = 0) -> Iterator[Guest]:
        """Boot a workload or a program whose working set is the last ``pages`` pages of RAM; it is paused."""
        program = load_workload(workload) if isinstance(workload, str) else workload
        try:
            vm = self.make_vm(VmConfig(memory_bytes=self.memory_bytes, cpus=self.cpus))
        except UsageError as error:
            raise Unfit(str(error)) from None
        try:
            log = vm.log_dirty
            if missing := [member for member in LOG_DIRTY_MEMBERS if not hasattr(log, member)]:
                raise Unfit(f"the tracker, a {type(log).__name__}, has no {', '.join(missing)}")
            params = GuestParams(
                working_set_bytes=pages * PAGE_SIZE,
                working_set_gpa=_last_pages(ram_layout(self.memory_bytes), pages),
                rate=rate,
                seed=self.seed,
                arguments=_DENSITIES if workload == "stamp" else (),
            )
            info = boot(vm, program, params=params)
            yield Guest(vm, info, program, StampOracle(info), self.watch)
        finally:
            vm.close()

    @contextmanager
    def stamping(self, *, pages: int = 96) -> Iterator[Guest]:
        """Boot ``stamp`` and run it to its first sync point, log-dirty off."""
        with self.guest("stamp", pages=pages) as guest:
            guest.start_stamping()
            yield guest

    @contextmanager
    def tracked(self, *, pages: int = 96) -> Iterator[Guest]:
        """As :meth:`stamping`, with log-dirty on since then."""
        with self.stamping(pages=pages) as guest:
            guest.log_dirty.enable()
            yield guest


def _last_pages(regions: tuple[RamRegion, ...], pages: int) -> int:
    left = pages
    for region in reversed(regions):
        if left <= region.pages:
            return region.gpa + region.size_bytes - left * PAGE_SIZE
        left -= region.pages
    raise Violation(f"{pages} pages do not fit into the guest")


class Copy:
    """A copy of a guest's memory, made only of what log-dirty reports: a migration in miniature.

    Args:
        memory: the original.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._original = memory
        self._copy = GuestMemory.linear(memory.size_bytes)

    def take_all(self) -> None:
        """Copy everything; log-dirty is on already."""
        self._take(*self._original.populated())

    def take(self, reported: DirtyBitmap) -> None:
        """Copy the pages that a ``clean()`` has reported; it has returned already.

        A reported page without storage was never written and is zero on both sides: reading it would only give it
        storage.
        """
        touched = DirtyBitmap(reported.nbits)
        for start, length in zip(*(part.tolist() for part in self._original.populated()), strict=True):
            touched.set_range(start, length)
        touched &= reported
        self._take(*touched.runs())

    def _take(self, starts: GfnArray, lengths: GfnArray) -> None:
        sources, targets = self._original.views(starts, lengths), self._copy.views(starts, lengths)
        for source, target in zip(sources, targets, strict=True):
            target[:] = source

    def require_equal(self) -> None:
        """Check that the copy equals the original, byte for byte; the guest is paused.

        Of a large guest only what either side says is populated; of a small one all, whatever they say.
        """
        touched = [expand_runs(*memory.populated()) for memory in (self._original, self._copy)]
        if self._original.size_bytes <= _COMPARE_ALL_BYTES:
            touched.append(self._original.all_ram().gfns())
        self.require_equal_at(np.unique(np.concatenate(touched)))

    def require_equal_at(self, gfns: GfnArray, when: str = "") -> None:
        """Check that the copy of frames (uint64[n], ascending) equals the original; ``when`` begins the message."""
        starts, lengths = runs_of(gfns)
        views = zip(self._original.views(starts, lengths), self._copy.views(starts, lengths), strict=True)
        wrong = []
        for start, (ours, theirs) in zip(starts.tolist(), views, strict=True):
            differs = np.frombuffer(ours, np.uint64) != np.frombuffer(theirs, np.uint64)
            wrong.append(
                np.flatnonzero(differs.reshape(-1, (1 << PAGE_SHIFT) // 8).any(axis=1)).astype(np.uint64)
                + np.uint64(start)
            )
        different = np.concatenate(wrong) if wrong else np.empty(0, np.uint64)
        require(
            not different.size, f"{when}the copy made of reported pages is not the guest's memory: {listed(different)}"
        )
