"""Boot: put a program into a fresh machine, as docs/reference/guest-abi.md says, ready for ``resume()``."""

from dataclasses import dataclass

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.core.state import MachineState
from pageferry.core.units import format_size
from pageferry.core.vm import Vm
from pageferry.guests import abi
from pageferry.guests.elf import Program

_U64_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestParams:
    """The parameters of a workload.

    Args:
        working_set_bytes: RAM that it works on, rounded up to pages; None: the program's default, bounded by memory.
        working_set_gpa: where that begins (a page boundary); None: right after the program.
        rate: operations per second and vCPU; 0: as fast as it can.
        seed: of whatever is pseudo-random in it.
        arguments: the program's own, u64 each, at most ``MAX_ARGUMENTS``.
    """

    working_set_bytes: int | None = None
    working_set_gpa: int | None = None
    rate: int = 0
    seed: int = 1
    arguments: tuple[int, ...] = ()


def boot(vm: Vm, program: Program, *, params: GuestParams | None = None) -> abi.GuestInfo:
    """Load ``program`` and the entry state into a machine that has not run yet.

    Memory is all zeros before (so bss is not written) and the machine is paused before and after.

    Returns:
        What the guest was told.

    Raises:
        UsageError: the memory is too small for program and working set, or a parameter is out of range; nothing was
            written.
        VmError: the machine refused the entry state.
    """
    info = plan(program, vm.memory, cpus=vm.config.cpus, params=params or GuestParams())
    for segment in program.segments:
        vm.memory.write(segment.gpa, segment.data)
    vm.memory.write(abi.PAGE_TABLES_GPA, abi.page_tables(_end_of_ram(vm.memory)))
    vm.memory.write(abi.INFO_GPA, info.pack())
    vcpus = tuple(abi.entry_state(program.entry, index) for index in range(vm.config.cpus))
    vm.load_state(MachineState(vcpus=vcpus, devices=vm.save_state().devices))
    return info


def plan(program: Program, memory: GuestMemory, *, cpus: int, params: GuestParams) -> abi.GuestInfo:
    """Decide what a guest will be told, without touching anything.

    Raises:
        UsageError: as :func:`boot`.
    """
    _check_range("the rate", params.rate)
    _check_range("the seed", params.seed)
    for argument in params.arguments:
        _check_range("a guest argument", argument)
    if len(params.arguments) > abi.MAX_ARGUMENTS:
        raise UsageError(f"{len(params.arguments)} guest arguments are too many", hint=f"at most {abi.MAX_ARGUMENTS}")
    if not 1 <= cpus <= abi.MAX_CPUS:
        raise UsageError(f"a guest with {cpus} vCPUs is not possible", hint=f"between 1 and {abi.MAX_CPUS}")
    _check_program(program, memory)
    start, size_bytes = _working_set(program, memory, params)
    return abi.GuestInfo(
        memory_bytes=memory.size_bytes,
        ram_regions=tuple((region.gpa, region.size_bytes) for region in memory.regions),
        cpus=cpus,
        working_set_gpa=start,
        working_set_bytes=size_bytes,
        rate=params.rate,
        seed=params.seed,
        arguments=params.arguments,
    )


def _check_program(program: Program, memory: GuestMemory) -> None:
    for segment in program.segments:
        if memory.is_ram(segment.gpa, segment.size_bytes):
            continue
        if segment.gpa < _end_of_ram(memory) and segment.end_gpa <= _end_of_ram(memory):
            raise UsageError(
                f"{program.name} has a segment at {segment.gpa:#x}, which is not RAM", hint="link it at 0x100000"
            )
        raise UsageError(
            f"memory too small for {program.name}: it has {format_size(memory.size_bytes)}, the program ends at "
            f"{program.end_gpa:#x}",
            hint=f"give it more than {_mib_up(program.end_gpa + program.min_working_set_bytes)}M",
        )


def _working_set(program: Program, memory: GuestMemory, params: GuestParams) -> tuple[int, int]:
    start = program.end_gpa if params.working_set_gpa is None else params.working_set_gpa
    if start % PAGE_SIZE:
        raise UsageError(f"the working set cannot begin at {start:#x}", hint="a page boundary is needed")
    if start < program.end_gpa or not any(r.gpa <= start <= r.gpa + r.size_bytes for r in memory.regions):
        raise UsageError(
            f"the working set cannot begin at {start:#x}", hint=f"in RAM, from {program.end_gpa:#x} (program end) up"
        )
    free = _ram_from(memory, start)
    if params.working_set_bytes is not None:
        if params.working_set_bytes < 0:
            raise UsageError(f"a working set of {params.working_set_bytes} bytes is not possible")
        wanted = (params.working_set_bytes + PAGE_SIZE - 1) & -PAGE_SIZE
        if wanted < program.min_working_set_bytes:
            raise UsageError(
                f"a working set of {format_size(wanted)} is too small for {program.name}",
                hint=f"at least {format_size(program.min_working_set_bytes)}",
            )
    else:
        default = program.default_working_set_bytes
        wanted = free // 2 if default is None else min(default, free)
        wanted = max(wanted & -PAGE_SIZE, program.min_working_set_bytes)
    if wanted > free:
        raise UsageError(
            f"memory too small: {program.name} with a working set of {format_size(wanted)} at {start:#x} needs "
            f"{_mib_up(memory.size_bytes + wanted - free)} MiB, the guest has {format_size(memory.size_bytes)}",
            hint="more memory or a smaller working set",
        )
    return start, wanted


def _ram_from(memory: GuestMemory, gpa: int) -> int:
    return sum(max(0, region.gpa + region.size_bytes - max(gpa, region.gpa)) for region in memory.regions)


def _end_of_ram(memory: GuestMemory) -> int:
    return memory.regions[-1].gpa + memory.regions[-1].size_bytes


def _mib_up(size_bytes: int) -> int:
    return (size_bytes + (1 << 20) - 1) >> 20


def _check_range(what: str, value: int) -> None:
    if not 0 <= value <= _U64_MAX:
        raise UsageError(f"{what} cannot be {value}", hint="a number from 0 to 2^64 - 1")
