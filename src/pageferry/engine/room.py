"""The machine for a guest that arrives, if this host has room for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pageferry.core.errors import UnsupportedError, UsageError, VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hostmem import MemFd, available_bytes
from pageferry.core.memory import GuestMemory
from pageferry.core.os_hints import resource_hint
from pageferry.core.ram import storage_bytes
from pageferry.core.units import format_size
from pageferry.core.vm import AnyVm, MachineModel, VmConfig
from pageferry.engine import features
from pageferry.engine.wire.channel import Channel
from pageferry.stream.ferry_frames import SourceHello

#: A host that could give less than this has no room for what arrives next.
_LEAST_LEFT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestLimits:
    """How large a guest may be that arrives; None: any."""

    memory_bytes: int | None = None
    cpus: int | None = None

    def check(self, config: VmConfig) -> None:
        """Check a guest before anything is made for it.

        Raises:
            UsageError: it is larger.
        """
        if self.memory_bytes is not None and config.memory_bytes > self.memory_bytes:
            asked, most = format_size(config.memory_bytes), format_size(self.memory_bytes)
            hint = "pageferry receive --max-memory there"
            raise UsageError(f"the guest has {asked} of memory, and {most} at the most is taken here", hint=hint)
        if self.cpus is not None and config.cpus > self.cpus:
            what = f"the guest has {config.cpus} vCPUs, and {self.cpus} at the most are taken here"
            raise UsageError(what, hint="pageferry receive --max-cpus there")


NO_LIMITS = GuestLimits()


def expect_more_room(memory: GuestMemory, host_has: Callable[[], int | None] = available_bytes) -> None:
    """Check, as a guest arrives, that its next pages will not be what the host has no room for.

    Args:
        memory: the guest's.
        host_has: tells how many bytes the host could give.

    Raises:
        UsageError: they may be.
    """
    available = host_has()
    if not memory.reserved and available is not None and available < _LEAST_LEFT_BYTES:
        raise UsageError(
            f"this host has {format_size(available)} of memory left while the guest arrives",
            hint="free memory here, or choose another destination",
        )


def expect_room(memory: GuestMemory, pages: int) -> None:
    """Check that the host could give so many pages to a guest's memory without swapping.

    Raises:
        UsageError: it could not.
    """
    available = available_bytes()
    if not memory.reserved and available is not None and pages * PAGE_SIZE > available:
        raise UsageError(
            f"the guest holds {format_size(pages * PAGE_SIZE)}, this host has {format_size(available)} available",
            hint="free memory here, or choose another destination",
        )


def stated_pages(hello: SourceHello) -> int:
    """Return how many pages of its guest hold memory, as a source says: no fewer than are in the runs that it names."""
    return max(hello.populated_pages, sum(pages for _, pages in hello.populated))


def make_machine(hello: SourceHello, channel: Channel, make_vm: Callable[[VmConfig], AnyVm]) -> tuple[AnyVm, bool]:
    """Make the machine that a source asks for, over the source's own memory where that can be.

    Args:
        hello: what the source says of its guest.
        channel: over which it said so; with the descriptor of the guest's memory, if that was handed over.
        make_vm: makes the machine, paused.

    Returns:
        The machine, and whether its memory is the source's.

    Raises:
        UsageError: this host has no room for it.
        VmError: no such machine can be made here.
    """
    try:
        return _make(hello, channel, make_vm)
    except VmError:
        raise
    except OSError as error:
        what = f"this host cannot make the machine: {error.strerror or error}"
        raise UsageError(what, hint=resource_hint(error)) from error


def _make(hello: SourceHello, channel: Channel, make_vm: Callable[[VmConfig], AnyVm]) -> tuple[AnyVm, bool]:
    config = _config(hello)
    size_bytes = storage_bytes(hello.memory_bytes)
    fd = channel.take_fd() if features.SHARED_MEMORY in hello.features else None
    if fd is not None:
        storage = MemFd.adopt(fd, size_bytes)
        try:
            return make_vm(replace(config, storage=storage)), True
        except BaseException as error:
            storage.close()
            if not isinstance(error, UnsupportedError) or error.capability != features.SHARED_MEMORY:
                raise
    vm = make_vm(config)
    try:
        expect_room(vm.memory, stated_pages(hello))
    except UsageError:
        vm.close()
        raise
    vm.memory.advice.begin_arrival()
    return vm, False


def _config(hello: SourceHello) -> VmConfig:
    try:
        machine = MachineModel(hello.machine or MachineModel.PLAIN)
    except ValueError as error:
        raise UnsupportedError(
            "machine",
            f"there is no machine model {hello.machine!r} here",
            hint="a newer release of pageferry at this end may know it",
        ) from error
    return VmConfig(
        memory_bytes=hello.memory_bytes, cpus=hello.cpus, cpu=hello.cpuid, machine=machine, devices=hello.devices
    )
