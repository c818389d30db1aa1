"""ELF64 loader: a file becomes a :class:`Program`, or one clear :class:`UsageError`.

Only static executables for x86-64 that run at their link address: the guest has an identity map and no dynamic
linker. Sections and symbols are not looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import Never

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.guests.abi import PROGRAM_BASE
from pageferry.guests.elf_file import (
    EM_X86_64,
    ET_DYN,
    ET_EXEC,
    PF_WRITE,
    PT_DYNAMIC,
    PT_INTERP,
    ElfFile,
    ElfSegment,
    read_elf,
)
from pageferry.guests.files import read_file

_HOW_TO_LINK = "link it with: gcc -ffreestanding -nostdlib -static -no-pie -Wl,-Ttext-segment=0x100000"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSegment:
    """One PT_LOAD: ``data`` at ``gpa``, zeros from there to ``gpa + size_bytes``."""

    gpa: int
    data: bytes
    size_bytes: int
    writable: bool

    @property
    def end_gpa(self) -> int:
        """The first address after the segment."""
        return self.gpa + self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A guest program, ready to be put into memory.

    ``segments`` are ascending and disjoint, none below ``PROGRAM_BASE``; ``end_gpa`` is the first page boundary after
    them. ``default_working_set_bytes`` is what the program likes to work on when it is not told (None: no opinion), and
    ``min_working_set_bytes`` what it cannot do without.
    """

    name: str
    entry: int
    segments: tuple[LoadSegment, ...]
    end_gpa: int
    default_working_set_bytes: int | None = None
    min_working_set_bytes: int = 0


def load_elf(path: str | PathLike[str]) -> Program:
    """Read an executable file.

    Raises:
        UsageError: the file cannot be read or is not a program that a guest can run.
    """
    return parse_elf(read_file(path), name=str(path))


def parse_elf(data: bytes, *, name: str) -> Program:
    """Make a program from the bytes of an executable file.

    Args:
        data: the whole file.
        name: how messages and the program call it.

    Raises:
        UsageError: it is not a program that a guest can run.
    """
    elf = read_elf(data, name=name)

    def refuse(why: str, hint: str = _HOW_TO_LINK) -> Never:
        raise UsageError(f"{name} {why}", hint=hint)

    if elf.bits != 64:
        refuse("is not a 64-bit ELF file", "compile it with -m64")
    if elf.machine != EM_X86_64:
        refuse(f"is not for x86-64 (machine {elf.machine})", "compile it for x86-64")
    if elf.kind == ET_DYN:
        refuse("is position-independent or a shared library, and a guest has no dynamic linker")
    if elf.kind != ET_EXEC:
        refuse(f"is not an executable (type {elf.kind})")
    if any(segment.kind in (PT_INTERP, PT_DYNAMIC) for segment in elf.segments):
        refuse("is dynamically linked, and a guest has no dynamic linker")
    loads = [_load_segment(elf, segment, refuse) for segment in elf.loads()]
    segments = tuple(sorted(loads, key=lambda s: s.gpa))
    for before, after in pairwise(segments):
        if after.gpa < before.end_gpa:
            refuse(f"has overlapping segments at {before.gpa:#x} and {after.gpa:#x}")
    entry = elf.entry
    if not any(s.gpa <= entry < s.end_gpa for s in segments):
        refuse(f"has its entry point {entry:#x} outside its segments")
    end_gpa = (segments[-1].end_gpa + PAGE_SIZE - 1) & -PAGE_SIZE
    return Program(name=name, entry=entry, segments=segments, end_gpa=end_gpa)


def _load_segment(elf: ElfFile, segment: ElfSegment, refuse: Callable[[str], Never]) -> LoadSegment:
    gpa, in_memory = segment.vaddr, segment.in_memory
    if gpa < PROGRAM_BASE:
        refuse(f"loads at {gpa:#x}, below {PROGRAM_BASE:#x}, where the guest ABI keeps its own pages")
    if gpa + in_memory > 1 << 47:
        refuse(f"loads at {gpa:#x}, beyond any guest's memory")
    return LoadSegment(
        gpa=gpa, data=elf.content(segment), size_bytes=in_memory, writable=bool(segment.flags & PF_WRITE)
    )
