"""ELF64 loader: a file becomes a :class:`Program`, or one clear :class:`UsageError`.

Only static executables for x86-64 that run at their link address: the guest has an identity map and no dynamic
linker. Sections and symbols are not looked at.
"""

from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Never

from elftools.common.exceptions import ELFError
from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.guests.abi import PROGRAM_BASE

_HOW_TO_LINK = "link it with: gcc -ffreestanding -nostdlib -static -no-pie -Wl,-Ttext-segment=0x100000"
_MAGIC = b"\x7fELF"
_MAX_SEGMENTS = 64
_MAX_FILE_BYTES = 256 << 20
_HEADER_BYTES = 64
_SEGMENT_HEADER_BYTES = 56
_PF_WRITE = 2


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
    them. ``default_working_set_bytes`` is what the program likes to work on when nobody says (None: no opinion), and
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
    try:
        with Path(path).open("rb") as file:
            data = file.read(_HEADER_BYTES)
            if data[:4] == _MAGIC:  # else it may be anything, of any size
                data += file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if len(data) >= _MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB and is no guest program")
    return parse_elf(data, name=str(path))


def parse_elf(data: bytes, *, name: str) -> Program:
    """Make a program from the bytes of an executable file.

    Args:
        data: the whole file.
        name: how messages and the program call it.

    Raises:
        UsageError: it is not a program that a guest can run.
    """

    def refuse(why: str, hint: str = _HOW_TO_LINK) -> Never:
        raise UsageError(f"{name} {why}", hint=hint)

    if data[:4] != _MAGIC:
        refuse("is not an ELF file", "give the name of a built-in workload or a static x86-64 executable")
    if len(data) < _HEADER_BYTES:
        refuse("is truncated: it ends inside the ELF header", "copy the file again")
    if data[4] != 2:
        refuse("is not a 64-bit ELF file", "compile it with -m64")
    if data[5] != 1:
        refuse("is not a little-endian ELF file", "compile it for x86-64")
    structs = ELFStructs(little_endian=True, elfclass=64)
    structs.create_basic_structs()
    try:
        header = struct_parse(structs.Elf_Ehdr, BytesIO(data))
        structs.create_advanced_structs(header["e_type"], header["e_machine"], header["e_ident"]["EI_OSABI"])
    except ELFError as error:
        raise UsageError(f"{name} has a malformed ELF header", hint=_HOW_TO_LINK) from error
    if header["e_machine"] != "EM_X86_64":
        refuse(f"is not for x86-64 ({header['e_machine']})", "compile it for x86-64")
    if header["e_type"] == "ET_DYN":
        refuse("is position-independent or a shared library, and a guest has no dynamic linker")
    if header["e_type"] != "ET_EXEC":
        refuse(f"is not an executable ({header['e_type']})")
    table, count, size = header["e_phoff"], header["e_phnum"], header["e_phentsize"]
    if count == 0:
        refuse("has nothing to load")
    if count > _MAX_SEGMENTS or size != _SEGMENT_HEADER_BYTES:
        refuse(f"has a malformed program header table ({count} entries of {size} bytes)")
    if table + count * size > len(data):
        refuse("is truncated: it ends inside the program header table", "copy the file again")
    headers = [struct_parse(structs.Elf_Phdr, BytesIO(data[table + i * size :][:size])) for i in range(count)]
    if any(h["p_type"] in ("PT_INTERP", "PT_DYNAMIC") for h in headers):
        refuse("is dynamically linked, and a guest has no dynamic linker")
    loads = [_load_segment(data, h, refuse) for h in headers if h["p_type"] == "PT_LOAD" and h["p_memsz"]]
    if not loads:
        refuse("has nothing to load")
    segments = tuple(sorted(loads, key=lambda s: s.gpa))
    for before, after in pairwise(segments):
        if after.gpa < before.end_gpa:
            refuse(f"has overlapping segments at {before.gpa:#x} and {after.gpa:#x}")
    entry = header["e_entry"]
    if not any(s.gpa <= entry < s.end_gpa for s in segments):
        refuse(f"has its entry point {entry:#x} outside its segments")
    end_gpa = (segments[-1].end_gpa + PAGE_SIZE - 1) & -PAGE_SIZE
    return Program(name=name, entry=entry, segments=segments, end_gpa=end_gpa)


def _load_segment(data: bytes, header: Any, refuse: Any) -> LoadSegment:  # noqa: ANN401 (elftools has no types)
    offset, in_file, in_memory, gpa = (header[key] for key in ("p_offset", "p_filesz", "p_memsz", "p_vaddr"))
    if in_file > in_memory:
        refuse(f"has a malformed segment at {gpa:#x}: more bytes in the file than in memory")
    if offset + in_file > len(data):
        refuse(f"is truncated: it ends inside the segment at {gpa:#x}", "copy the file again")
    if gpa < PROGRAM_BASE:
        refuse(f"loads at {gpa:#x}, below {PROGRAM_BASE:#x}, where the guest ABI keeps its own pages")
    if gpa + in_memory > 1 << 47:
        refuse(f"loads at {gpa:#x}, beyond any guest's memory")
    return LoadSegment(
        gpa=gpa,
        data=data[offset : offset + in_file],
        size_bytes=in_memory,
        writable=bool(header["p_flags"] & _PF_WRITE),
    )
