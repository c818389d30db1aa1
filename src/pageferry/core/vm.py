"""The narrow waist: all that the engine knows of a machine with a guest.

The software hypervisor and KVM are interchangeable behind :class:`Vm`, and every dirty tracker behind
:class:`LogDirty`, which is the interface of the 2007 Xen RFC. What only a machine of this process can do besides is in
:mod:`pageferry.core.machine`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.cpuid import CpuModel, Leaves
from pageferry.core.device_spec import DeviceSpec
from pageferry.core.frames import GfnArray
from pageferry.core.hostmem import MemFd
from pageferry.core.memory import GuestMemory
from pageferry.core.state import MachineState


class MachineModel(StrEnum):
    """Machine models: the devices of a machine besides RAM, vCPUs and the standard devices.

    PLAIN: nothing. PC: a PC's interrupt controllers, timer and power management, as an operating system wants them.
    """

    PLAIN = "plain"
    PC = "pc"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """The configuration of a machine that is to hold a guest.

    ``memory_bytes`` is a multiple of the page size; ``cpus`` is the number of vCPUs. ``cpu`` is what CPUID shows: a
    model, to be made of what the machine offers, or the table of a guest that has one already. A guest keeps its
    ``machine`` model for life. ``devices``: its virtio devices, in the order of their PCI slots; only a PC has any.
    ``storage``: the memory of another process on this host, to be taken over with its content (as
    :attr:`GuestMemory.storage` is); a machine that cannot refuses as ``shared-memory``.
    """

    memory_bytes: int
    cpus: int = 1
    cpu: CpuModel | Leaves = CpuModel.BASELINE
    machine: MachineModel = MachineModel.PLAIN
    devices: tuple[DeviceSpec, ...] = ()
    storage: MemFd | None = None


class VmStatus(StrEnum):
    """The status of a guest. SHUTDOWN and CRASHED are final."""

    PAUSED = "paused"
    RUNNING = "running"
    SHUTDOWN = "shutdown"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDirtyStats:
    """Counters of one tracker since ``enable()``; None is "this tracker cannot know".

    ``fault_count``: write faults taken to find dirty pages. ``dirty_count``: bits set now.
    ``failed_allocations``: bitmap or table memory that was refused (PEEK and CLEAN fail while it is not 0).
    """

    fault_count: int | None
    dirty_count: int
    failed_allocations: int = 0


class LogDirty(Protocol):
    """The RFC's four operators, and what every writer that is not a vCPU needs.

    All methods may be called from any thread while the guest runs. The bitmaps have ``memory.gfn_limit`` bits and are
    the caller's own. Law 1: at every instant each RAM page is dirty or not writable. Law 2: ``clean()`` loses no write.
    """

    @property
    def tracker(self) -> str:
        """The tracker's name: ``hap``, ``kvm-bitmap``, ..."""

    @property
    def enabled(self) -> bool:
        """Whether log-dirty is on."""

    def enable(self) -> None:
        """ENABLE: allocate the bitmap (all clear), set the mode bit, make all RAM NOT WRITABLE; the guest runs on.

        Raises:
            LogDirtyError: log-dirty is on already.
        """

    def peek(self) -> DirtyBitmap:
        """PEEK: return a copy of the bitmap; nothing else changes.

        Raises:
            LogDirtyError: log-dirty is off, or the bitmap is incomplete (an allocation failed).
        """

    def clean(self) -> DirtyBitmap:
        """CLEAN: return the bitmap, clear it, make RAM NOT WRITABLE again; the guest runs on.

        When this returns no vCPU holds a stale writable translation.

        Raises:
            LogDirtyError: as :meth:`peek`; then no bit was cleared.
        """

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of these frames only; bits and protection of all others stay as they are.

        A large guest is cleaned this way, each part just before it is read: what turns dirty again before its part
        comes is sent once.

        Args:
            gfns: its start is a multiple of 64, its stop one too or not below ``memory.gfn_limit``. Frames that are
                not RAM may be in it.

        Returns:
            A bitmap of ``memory.gfn_limit`` bits, of which only those of the range may be set.

        Raises:
            LogDirtyError: as :meth:`peek`; then no bit was cleared.
            ValueError: the range is not as it must be; no bit was cleared.
        """

    def off(self) -> None:
        """OFF: make all RAM WRITABLE, clear the mode bit, free the bitmap. Does nothing when it is off already."""

    def mark(self, gfns: GfnArray) -> None:
        """Mark frames dirty, *after* writing them by other means than a vCPU. Does nothing while log-dirty is off.

        Frames that are not RAM are ignored. Who has taken bits by :meth:`clean` gives them back in the same way.
        """

    def stats(self) -> LogDirtyStats:
        """Return the counters; does not disturb the bitmap. Needs log-dirty on."""


#: What a tracker must have.
LOG_DIRTY_MEMBERS = ("tracker", "enabled", "enable", "peek", "clean", "clean_range", "off", "mark", "stats")


class AbsentPages(Protocol):
    """The frames of a guest that are absent, and how they get their content; made by :meth:`Vm.await_memory`."""

    def install(self, gfns: GfnArray, content: NDArray[np.uint8]) -> None:
        """Give frames their content, and let the threads that wait for them go on; any thread may call it.

        Args:
            gfns: uint64[n], ascending; none was installed by a call that returned.
            content: uint8[4096 n], one after another.

        Raises:
            VmError: the host refused; the same call may be made again, and harms no frame that was installed.
        """

    def finish(self) -> None:
        """Let what was not installed be zeros: all of memory is there. Called once; nothing is installed after it."""

    def close(self) -> None:
        """Free what served this, after :meth:`finish`; not from ``fetch``, nor while ``fetch`` waits for the caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestEnd:
    """Why a guest stopped for good: its exit code (SHUTDOWN), or one line on what it did (CRASHED).

    ``reset``: it asked to be started anew, which is its end here; the exit code is 0.
    """

    exit_code: int | None = None
    crash: str | None = None
    reset: bool = False


class Vm(Protocol):
    """A guest to move, or a machine to move it into: memory, log-dirty, freeze and thaw, state.

    A new one is paused, with zeroed memory and vCPUs in an undefined state. Methods may be called from any thread but a
    vCPU's own.
    """

    config: VmConfig
    memory: GuestMemory
    cpuid: Leaves
    """The guest's CPUID table; see :mod:`pageferry.core.cpuid`."""

    @property
    def accel(self) -> str:
        """The kind of machine: ``kvm``, ``soft``."""

    @property
    def log_dirty(self) -> LogDirty:
        """The tracker of this machine."""

    @property
    def status(self) -> VmStatus:
        """What the guest is doing now."""

    @property
    def end(self) -> GuestEnd | None:
        """Set once the status is SHUTDOWN or CRASHED."""

    def resume(self) -> None:
        """Let the guest run; nothing happens when it runs already.

        Raises:
            VmError: the guest has ended.
        """

    def freeze(self) -> None:
        """Hold every vCPU at an instruction boundary with no I/O under way until :meth:`thaw`; nests.

        This is the engine's pause. It neither reads nor changes the user's (``status``): a failed migration has nothing
        to restore, and ``resume`` cannot run a guest that has left.
        """

    def thaw(self) -> None:
        """Undo one :meth:`freeze`.

        Raises:
            VmError: the guest is not frozen.
        """

    def save_state(self) -> MachineState:
        """Return everything but memory. The guest is paused or frozen."""

    def load_state(self, state: MachineState) -> None:
        """Replace everything but memory. The guest is paused or frozen.

        Raises:
            VmError: this machine cannot hold that state (wrong number of vCPUs, a device it lacks, ...).
        """

    def await_memory(self, fetch: Callable[[GfnArray], None], absent: DirtyBitmap) -> AbsentPages:
        """Let RAM be absent: an access to such a frame waits until ``fetch`` has installed it.

        The guest has not run, and no other thread touches its memory during the call.

        Args:
            absent: the frames to make absent; their content is lost. A frame without storage is absent in any case.
            fetch: called with frames (uint64[n] ascending, some of them perhaps installed already), on the thread that
                touches them or one that serves it; returns when they are installed.

        Raises:
            UnsupportedError: this host or machine cannot; says why.
            VmError: the host refused otherwise. In both cases the content of ``absent`` is lost.
        """

    def remove_pages(self, gfns: GfnArray) -> None:
        """Take frames away from the guest: afterwards they are not RAM (``memory.removed``). The guest is paused.

        Raises:
            VmError: this machine cannot, or a frame is not RAM; nothing was removed.
        """

    def claim_backends(self) -> None:
        """Claim this host's disks and networks for the guest's devices. Any thread.

        A machine is made without it, for its guest may still run elsewhere; a guest that runs has it. Nothing happens
        when they are claimed already.

        Raises:
            VmError: another process has one of them, which the error names; none is claimed then, and the guest must
                not run.
        """

    def release_backends(self) -> None:
        """Give them back, with all that the guest wrote on the disks. The guest is frozen, and runs on after a claim.

        Raises:
            VmError: what was written could not be put on a disk.
        """

    def close(self) -> None:
        """Stop the guest and free the machine; the object is dead afterwards. May be called twice."""


AnyVm = TypeVar("AnyVm", bound=Vm)
"""The machine that a caller has the engine make or fill, and gets back."""
