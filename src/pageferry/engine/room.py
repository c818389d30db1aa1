"""The machine for a guest that arrives, if this host has room for it."""

from collections.abc import Callable
from dataclasses import replace

from pageferry.core.errors import UnsupportedError, UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hostmem import MemFd, available_bytes
from pageferry.core.memory import GuestMemory, storage_bytes
from pageferry.core.units import format_size
from pageferry.core.vm import AnyVm, MachineModel, VmConfig
from pageferry.engine import features
from pageferry.engine.wire.channel import Channel
from pageferry.stream.ferry_frames import SourceHello


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


def claimed_pages(hello: SourceHello) -> int:
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
        expect_room(vm.memory, claimed_pages(hello))
    except UsageError:
        vm.close()
        raise
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
