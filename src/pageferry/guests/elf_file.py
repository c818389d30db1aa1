"""The headers of an ELF file of either class: what it is for, where it is entered, what is loaded where.

Sections and symbols are not looked at.

Source: System V ABI, chapters "Object files" and "Program loading".
"""

import struct
from dataclasses import dataclass

from pageferry.core.errors import UsageError
from pageferry.guests.placement import LoadedPart

MAGIC = b"\x7fELF"
#: Enough of a file to know that it is one.
HEADER_BYTES = 64

ET_REL, ET_EXEC, ET_DYN = 1, 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE = 1, 2, 3, 4
PF_WRITE = 2

_AGAIN = "copy the file again"
_IDENT_BYTES = 16
_CLASS, _ORDER = 4, 5
_LITTLE_ENDIAN = 1
_MAX_SEGMENTS = 64
#: By class: bits, the header after its first 16 bytes, and a program header.
_CLASSES = {
    1: (32, struct.Struct("<HHIIIIIHHHHHH"), struct.Struct("<8I")),
    2: (64, struct.Struct("<HHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")),
}
_NOTE = struct.Struct("<III")


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfSegment:
    """A program header: ``in_file`` bytes of the file at ``offset``, ``in_memory`` bytes in memory, the rest zeros."""

    kind: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    in_file: int
    in_memory: int

    @property
    def place(self) -> slice:
        """Where its content is in the file."""
        return slice(self.offset, self.offset + self.in_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfFile:
    """An ELF file's headers. ``bits`` is 32 or 64; ``kind`` and ``machine`` are ET_ and EM_ numbers."""

    name: str
    data: bytes | memoryview
    bits: int
    kind: int
    machine: int
    entry: int
    segments: tuple[ElfSegment, ...]

    def loads(self) -> tuple[ElfSegment, ...]:
        """Return the segments that take room in memory, in the file's order.

        Raises:
            UsageError: one of them is malformed, or its bytes are not all in the file; or there are none.
        """
        loads = tuple(segment for segment in self.segments if segment.kind == PT_LOAD and segment.in_memory)
        if not loads:
            raise UsageError(f"{self.name} has nothing to load", hint="give the linked program itself")
        for segment in loads:
            if segment.in_file > segment.in_memory:
                raise UsageError(
                    f"{self.name} has a malformed segment at {segment.vaddr:#x}: more bytes in the file than in memory",
                    hint=_AGAIN,
                )
            if segment.offset + segment.in_file > len(self.data):
                raise UsageError(
                    f"{self.name} is truncated: it ends inside the segment at {segment.vaddr:#x}", hint=_AGAIN
                )
        return loads

    def physical(self) -> tuple[LoadedPart, ...]:
        """Return what is loaded, at physical addresses.

        Raises:
            UsageError: as :meth:`loads`.
        """
        return tuple(
            LoadedPart(gpa=segment.paddr, data=memoryview(self.data)[segment.place], size_bytes=segment.in_memory)
            for segment in self.loads()
        )

    def content(self, segment: ElfSegment) -> bytes:
        """Return the bytes of a segment that are in the file, those of them that are there."""
        return bytes(self.data[segment.place])

    def note(self, owner: bytes, kind: int) -> bytes | None:
        """Return the content of the first note of ``owner`` with the number ``kind``; None if there is none."""
        for segment in self.segments:
            if segment.kind != PT_NOTE:
                continue
            notes, at = self.content(segment), 0
            while at + _NOTE.size <= len(notes):
                owner_bytes, content_bytes, found = _NOTE.unpack_from(notes, at)
                owner_at = at + _NOTE.size
                content_at = owner_at + (owner_bytes + 3) // 4 * 4
                at = content_at + (content_bytes + 3) // 4 * 4
                if found == kind and notes[owner_at : owner_at + owner_bytes].rstrip(b"\0") == owner:
                    return notes[content_at : content_at + content_bytes]
        return None


def read_elf(data: bytes | memoryview, *, name: str) -> ElfFile:
    """Read the headers of a little-endian ELF file.

    Args:
        data: the whole file.
        name: how messages call it.

    Raises:
        UsageError: it is not an ELF file, or its headers are malformed or cut short.
    """
    if data[:4] != MAGIC:
        raise UsageError(f"{name} is not an ELF file", hint="pageferry run --help tells what a guest can be")
    if len(data) < HEADER_BYTES:
        raise UsageError(f"{name} is truncated: it ends inside the ELF header", hint=_AGAIN)
    if data[_ORDER] != _LITTLE_ENDIAN:
        raise UsageError(f"{name} is not a little-endian ELF file", hint="compile it for x86-64")
    if data[_CLASS] not in _CLASSES:
        raise UsageError(f"{name} has a malformed ELF header", hint=_AGAIN)
    bits, header, program_header = _CLASSES[data[_CLASS]]
    kind, machine, _, entry, table, *_, size, count, _, _, _ = header.unpack_from(data, _IDENT_BYTES)
    if count and (count > _MAX_SEGMENTS or size != program_header.size):
        raise UsageError(f"{name} has a malformed program header table ({count} entries of {size} bytes)", hint=_AGAIN)
    if table + count * size > len(data):
        raise UsageError(f"{name} is truncated: it ends inside the program header table", hint=_AGAIN)
    headers = (program_header.unpack_from(data, table + index * size) for index in range(count))
    segments = tuple(_segment(bits, fields) for fields in headers)
    return ElfFile(name=name, data=data, bits=bits, kind=kind, machine=machine, entry=entry, segments=segments)


def _segment(bits: int, fields: tuple[int, ...]) -> ElfSegment:
    if bits == 64:
        kind, flags, offset, vaddr, paddr, in_file, in_memory, _ = fields
    else:
        kind, offset, vaddr, paddr, in_file, in_memory, flags, _ = fields
    return ElfSegment(
        kind=kind, flags=flags, offset=offset, vaddr=vaddr, paddr=paddr, in_file=in_file, in_memory=in_memory
    )
