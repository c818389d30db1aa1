"""The built-in guest programs, by name."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.guests.elf import Program, load_elf, parse_elf

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A built-in program. ``summary`` is one line for people; an *operation* is what its rate counts."""

    name: str
    summary: str
    operation: str
    default_working_set_bytes: int
    min_working_set_bytes: int


def _workload(name: str, summary: str, operation: str, default_mib: int, min_pages: int) -> Workload:
    return Workload(
        name=name,
        summary=summary,
        operation=operation,
        default_working_set_bytes=default_mib * _MIB,
        min_working_set_bytes=min_pages * PAGE_SIZE,
    )


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        _workload("idle", "waits on the clock and counts; writes next to nothing", "wait", 0, 0),
        _workload("sweep", "writes each page of the working set in turn, for ever", "page written", 64, 1),
        _workload("random", "writes a random page each time", "page written", 64, 1),
        _workload("rewrite", "fills its working set, then rewrites a part of it for ever", "page written", 64, 1),
        _workload("hotset", "90 % of its writes go to 10 % of the working set", "page written", 64, 1),
        _workload("kv", "a hash table under inserts, updates and deletes that checks itself", "table operation", 64, 4),
        _workload("stamp", "writes the round number it is told, for the test oracle", "round", 16, 1),
        _workload("pagetables", "remaps pages in its own page tables, writes through them, checks", "remap", 8, 1),
        _workload("smp", "vCPUs that send each other items through rings, and check them", "item received", 16, 4),
        _workload("echo", "answers each line typed at its console with its number and itself", "look for input", 0, 0),
        _workload("timers", "checks that no clock of its runs backwards or apart from the others", "check", 0, 0),
        _workload("dma", "fills and copies through the DMA engine and checks the result", "transfer", 8, 4),
    )
}


@cache
def load_workload(name: str) -> Program:
    """Return a built-in program.

    Raises:
        UsageError: no workload has that name.
    """
    workload = WORKLOADS.get(name)
    if workload is None:
        raise UsageError(f"unknown workload {name!r}", hint=f"one of {', '.join(WORKLOADS)}, or an ELF file")
    image = files("pageferry.guests").joinpath("images", f"{name}.elf").read_bytes()
    return replace(
        parse_elf(image, name=name),
        default_working_set_bytes=workload.default_working_set_bytes,
        min_working_set_bytes=workload.min_working_set_bytes,
    )


def names_file(name_or_path: str) -> bool:
    """Tell whether this is a path (has a ``/`` or ends in ``.elf``) or a file's name, and no built-in program's."""
    if name_or_path in WORKLOADS:
        return False
    return "/" in name_or_path or name_or_path.endswith(".elf") or Path(name_or_path).is_file()


def load_guest(name_or_path: str) -> Program:
    """Return a built-in program, or the one in an ELF file.

    Raises:
        UsageError: neither, or not a program that a guest can run.
    """
    return load_elf(name_or_path) if names_file(name_or_path) else load_workload(name_or_path)
