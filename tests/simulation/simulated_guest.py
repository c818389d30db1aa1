"""A simulated guest, the machines that it runs on, and the ledger of what its memory must be.

The guest has a few dozen pages, and a counter in a register. Each step reads a page, which must be as the ledger says,
writes it, and counts; what is written goes into the ledger too. A machine is the engine's ``Vm`` with real guest
memory and the simplest tracker there can be. The ledger belongs to the guest: a second one that ran anywhere would
meet pages, or a count, that are not its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pageferry.core.bitmap import DirtyBitmap, expand_runs
from pageferry.core.cpuid import CpuidLeaf
from pageferry.core.errors import LogDirtyError, UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M
from pageferry.core.memory import GuestMemory
from pageferry.core.state import MachineState, ring_3_state
from pageferry.core.vm import GuestEnd, LogDirtyStats, VmConfig, VmStatus
from simulation.interleave import Violated
from simulation.simulated_host import SimulatedHost, Simulation

MEMORY_BYTES = 8 << 20
_REGIONS = MEMORY_BYTES // PAGE_SIZE // PAGES_PER_2M
_ZEROS = bytes(PAGE_SIZE)
_LONGEST_REST_S = 5.0


class Disk:
    """What stands behind the guest's devices: one machine has it at a time.

    Args:
        slow_s: how long taking it or giving it back may take.
    """

    def __init__(self, slow_s: float) -> None:
        self.slow_s = slow_s
        self.holder: Machine | None = None


class Ledger:
    """The guest, wherever it is: its pages, its count, and which machine may run it.

    Args:
        simulation: draws what it does.
        pages: how many it uses.
        pace_s: how long it rests between two steps, about; longer and longer while nothing moves.
        moved: returns a number that grows while something moves.
    """

    def __init__(self, simulation: Simulation, *, pages: int, pace_s: float, moved: Callable[[], int]) -> None:
        self._draw = simulation.draw
        where = self._draw.sample(range(1, PAGES_PER_2M), pages)
        self.gfns = [self._draw.randrange(_REGIONS) * PAGES_PER_2M + gfn for gfn in where]
        self._hot = self.gfns[: max(1, pages // 8)]
        self.pages = dict.fromkeys(self.gfns, _ZEROS)
        self.count = 0
        self._pace_s = self._rest_s = pace_s
        self._moved, self._last_moved = moved, 0
        self.machines: list[Machine] = []
        self.ends_after: int | None = None
        self.on_refused: Callable[[Machine], None] = lambda _: None

    def expect_alone(self) -> None:
        """Check that no two machines run the guest."""
        running = [machine for machine in self.machines if machine.runs]
        if len(running) > 1:
            raise Violated("two guests run: on " + " and ".join(machine.name for machine in running))

    def rest_s(self) -> float:
        """Return how long to rest now."""
        moved = self._moved()
        self._rest_s = self._pace_s if moved != self._last_moved else min(1.3 * self._rest_s, _LONGEST_REST_S)
        self._last_moved = moved
        return self._rest_s * (0.5 + self._draw.random())

    def step(self, machine: "Machine") -> None:
        """Run the guest for a step."""
        self.expect_alone()
        if machine.count != self.count:
            raise Violated(f"the guest on {machine.name} is at {machine.count}, and was at {self.count}")
        gfn = self._draw.choice(self._hot if self._draw.random() < 0.7 else self.gfns)
        machine.touch(gfn)
        if machine.read(gfn) != self.pages[gfn]:
            raise Violated(f"gfn {gfn:#x} on {machine.name} is not what the guest wrote there")
        self.pages[gfn] = page = self._changed(self.pages[gfn])
        machine.count = self.count = self.count + 1
        machine.write(gfn, page)
        if self.ends_after is not None and self.count >= self.ends_after:
            machine.finish()

    def snapshot(self) -> tuple[int, dict[int, bytes]]:
        """Return how the guest is now."""
        return self.count, dict(self.pages)

    def go_back(self, snapshot: tuple[int, dict[int, bytes]]) -> None:
        """Let the guest be as it was: what it did since is lost."""
        self.count, self.pages = snapshot[0], dict(snapshot[1])

    def fill(self, machine: "Machine") -> None:
        """Give the guest its first pages."""
        for gfn in self.gfns[: len(self.gfns) * 3 // 4]:
            self.pages[gfn] = page = self._draw.randbytes(64) * (PAGE_SIZE // 64)
            machine.write(gfn, page)

    def expect_kept(self, machine: "Machine") -> None:
        """Check all memory of the machine where the guest is."""
        if machine.count != self.count:
            raise Violated(f"the guest on {machine.name} is at {machine.count}, and was at {self.count}")
        for gfn in {*self.gfns, *expand_runs(*machine.memory.populated()).tolist()}:
            if machine.read(gfn) != self.pages.get(gfn, _ZEROS):
                raise Violated(f"gfn {gfn:#x} on {machine.name} is not what the guest wrote there")

    def _changed(self, page: bytes) -> bytes:
        kind = self._draw.random()
        if kind < 0.1:
            return _ZEROS
        if kind < 0.3:
            return self._draw.randbytes(16) * (PAGE_SIZE // 16)
        at = 8 * self._draw.randrange(PAGE_SIZE // 8)
        return page[:at] + self.count.to_bytes(8, "little") + page[at + 8 :]


class Log:
    """A tracker that is told of every write.

    Args:
        memory: the guest's.
        step: lets others go first.
    """

    tracker = "simulated"

    def __init__(self, memory: GuestMemory, step: Callable[[], None]) -> None:
        self._memory = memory
        self._step = step
        self._dirty: DirtyBitmap | None = None

    @property
    def enabled(self):
        """Whether it is on."""
        return self._dirty is not None

    def enable(self):
        """Begin."""
        self._step()
        if self._dirty is not None:
            raise LogDirtyError("log-dirty is on already")
        self._dirty = DirtyBitmap(self._memory.gfn_limit)
        self._memory.on_write(self.mark)

    def peek(self):
        """Copy the bitmap."""
        self._step()
        return self._bits().copy()

    def clean(self):
        """Take the bitmap."""
        return self.clean_range(range(self._memory.gfn_limit))

    def clean_range(self, gfns):
        """Take the bits of some frames."""
        self._step()
        taken, bits = DirtyBitmap(self._memory.gfn_limit), self._bits()
        words = bits.words_of(gfns)
        taken.words[words] = bits.words[words]
        bits.words[words] = 0
        return taken

    def off(self):
        """End."""
        self._step()
        self._dirty = None
        self._memory.on_write(None)

    def mark(self, gfns):
        """Note a write."""
        if self._dirty is not None:
            self._dirty.set(gfns)

    def stats(self):
        """Count."""
        return LogDirtyStats(fault_count=None, dirty_count=self._bits().count())

    def _bits(self):
        if self._dirty is None:
            raise LogDirtyError("log-dirty is off")
        return self._dirty


class Absent:
    """The absent pages of a machine."""

    def __init__(self, memory: GuestMemory, fetch) -> None:
        self._memory = memory
        self.over = False
        memory.on_touch(fetch)

    def install(self, gfns, content):
        """Give frames their content."""
        for at, gfn in enumerate(gfns.tolist()):
            self._memory.mapping.view[gfn * PAGE_SIZE :][:PAGE_SIZE] = content[at * PAGE_SIZE :][:PAGE_SIZE]

    def finish(self):
        """Nothing is absent any more."""
        self.over = True
        self._memory.on_touch(None)

    def close(self):
        """Nothing serves this."""


@dataclass
class Refusals:
    """What a machine refuses, each so many times: by the names of its methods."""

    left: dict[str, int]

    def meet(self, what: str) -> None:
        """Refuse, if that is due."""
        if self.left.get(what, 0):
            self.left[what] -= 1
            raise VmError(f"simulated: {what} failed")


class Machine:
    """A machine for one guest; see :class:`pageferry.core.vm.Vm`.

    Args:
        host: whose threads its vCPU is one of.
        ledger: the guest.
        disk: behind its devices, if there is one.
        refusals: what fails here.
        waits: whether it can let its guest wait for pages.
    """

    accel = "simulated"
    cpuid = (CpuidLeaf(leaf=0, subleaf=0, eax=0, ebx=0, ecx=0, edx=0),)

    def __init__(
        self, host: SimulatedHost, ledger: Ledger, disk: Disk | None, refusals: Refusals, *, waits: bool = True
    ) -> None:
        self.host = host
        self.name = host.process.name
        self.config = VmConfig(memory_bytes=MEMORY_BYTES)
        self.memory = GuestMemory.linear(MEMORY_BYTES)
        self.memory.storage, self._storage = None, self.memory.storage
        self.log_dirty = Log(self.memory, host.simulation.step)
        self.status = VmStatus.PAUSED
        self.end: GuestEnd | None = None
        self.count = 0
        self.closed = False
        self.refusals = refusals
        self._ledger = ledger
        self.disk = disk
        self._waits = waits
        self.frozen = 0
        self._absent: Absent | None = None
        self._busy = self._claimed = False
        self._changed = host.condition()
        self._vcpu = host.thread(self._run, "vcpu")
        ledger.machines.append(self)

    # -- the guest's -----------------------------------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        """Whether the guest runs here."""
        alive = not self.closed and not self.host.process.dead
        return alive and self.status is VmStatus.RUNNING and not self.frozen

    def touch(self, gfn: int) -> None:
        """Wait for a page, if it is missing."""
        if self._absent is not None and not self._absent.over:
            self.memory.views(np.array([gfn], np.uint64), np.array([1], np.uint64))

    def read(self, gfn: int) -> bytes:
        """Return a page."""
        return bytes(self.memory.mapping.view[gfn * PAGE_SIZE :][:PAGE_SIZE])

    def write(self, gfn: int, page: bytes) -> None:
        """Write a page, which others may read before it is marked, as a device does."""
        with self.memory.writing([(gfn * PAGE_SIZE, PAGE_SIZE)]) as (view,):
            view[:] = page
            if self.host.simulation.current.name == "vcpu":
                self.host.simulation.step()

    def finish(self) -> None:
        """The guest ends."""
        self.end, self.status = GuestEnd(exit_code=0), VmStatus.SHUTDOWN

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.runs or self.closed)
                if self.closed or self.end is not None:
                    return
                self._busy = True
            try:
                self._ledger.step(self)
            except VmError:  # a page that will not come
                return
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
            self.host.sleep(self._ledger.rest_s())

    # -- the machine's ---------------------------------------------------------------------------------------------

    def resume(self, *, by_user=False):
        """Let the guest run; what fails, fails where it has arrived."""
        try:
            if not by_user:
                self.refusals.meet("resume")
        except VmError:
            self._ledger.on_refused(self)
            raise
        if self.end is not None:
            raise VmError("the guest has ended")
        self.status = VmStatus.RUNNING
        self._ledger.expect_alone()
        with self._changed:
            self._changed.notify_all()
        if self._vcpu.ident is None:
            self._vcpu.start()

    def pause(self):
        """Let it stand still for its user."""
        if self.status is VmStatus.RUNNING:
            self.status = VmStatus.PAUSED

    def freeze(self):
        """Let it stand still for the engine."""
        with self._changed:
            self.frozen += 1
            self._changed.wait_for(lambda: not self._busy)

    def thaw(self):
        """Undo that."""
        with self._changed:
            if not self.frozen:
                raise VmError("the guest is not frozen")
            self.frozen -= 1
            self._ledger.expect_alone()
            self._changed.notify_all()

    def save_state(self):
        """Return the register."""
        self.refusals.meet("save_state")
        return MachineState(vcpus=(ring_3_state(rip=0x1000, rsp=0, cr3=0, rdi=self.count),), devices=())

    def load_state(self, state):
        """Set it."""
        self.refusals.meet("load_state")
        self.count = state.vcpus[0].rdi

    def await_memory(self, fetch, absent):
        """Let pages be absent."""
        if not self._waits:
            raise UnsupportedError("postcopy", "simulated: no guest waits here")
        self.refusals.meet("await_memory")
        for gfn in absent.gfns().tolist():
            self.memory.mapping.view[gfn * PAGE_SIZE :][:PAGE_SIZE] = _ZEROS
        self._absent = Absent(self.memory, fetch)
        return self._absent

    def remove_pages(self, gfns):
        """No page is given back here."""
        raise VmError("simulated: no page can be removed")

    def claim_backends(self):
        """Take the disk."""
        self.refusals.meet("claim_backends")
        if self.disk is None or self.disk.holder is self:
            return
        self._wait_for_disk(self.disk)
        if self.disk.holder not in (None, self):
            raise VmError(f"the disk is in use by {self.disk.holder.name}")
        self.disk.holder = self

    def release_backends(self):
        """Give it back."""
        self.refusals.meet("release_backends")
        if self.disk is not None and self.disk.holder is self:
            self._wait_for_disk(self.disk)
            self.disk.holder = None

    def _wait_for_disk(self, disk: Disk) -> None:
        if disk.slow_s:
            self.host.sleep(disk.slow_s * self.host.simulation.draw.random())

    def close(self):
        """End it."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        if self._vcpu.ident is not None:
            self._vcpu.join()
        self.lose()

    def lose(self) -> None:
        """Free what it has; nothing of it runs any more."""
        self.closed = True
        if self.disk is not None and self.disk.holder is self:
            self.disk.holder = None
        self.memory.close()
        if self._storage is not None:
            self._storage.close()
            self._storage = None
