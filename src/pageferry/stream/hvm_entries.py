"""The entries that an HVM context is made of, whatever is in them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct

from pageferry.core.errors import RecordError
from pageferry.stream.format import MAX_HVM_CONTEXT_BYTES

#: typecode u16, instance u16, length u32.
ENTRY_HEADER = Struct("<HHI")


class Typecode(IntEnum):
    """Entries by name. Ours are 0x7F00 to 0x7FFF."""

    END = 0
    HEADER = 1
    CPU = 2
    PIC = 3
    IOAPIC = 4
    LAPIC = 5
    LAPIC_REGS = 6
    PCI_IRQ = 7
    ISA_IRQ = 8
    PCI_LINK = 9
    PIT = 10
    RTC = 11
    HPET = 12
    PMTIMER = 13
    MTRR = 14
    CPU_XSAVE = 16
    VMCE_VCPU = 18
    TSC_ADJUST = 19
    CPU_MSR = 20
    DEVICE = 0x7F00
    CPU_EVENTS = 0x7F01
    CPU_EXCEPTION = 0x7F02
    KVM_CLOCK = 0x7F03
    PAUSED = 0x7F04


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of an HVM context; ``offset`` is its first byte in the context (None: made here)."""

    typecode: int
    instance: int = 0
    body: bytes = field(repr=False, default=b"")
    offset: int | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The entry's name and instance, for errors."""
        try:
            name = Typecode(self.typecode).name
        except ValueError:
            name = f"typecode {self.typecode:#x}"
        return f"HVM_CONTEXT {name} {self.instance}"

    def refusal(self, why: str) -> RecordError:
        """Return the error that says ``why`` this entry cannot be taken."""
        return RecordError(why, record=self.name, offset=self.offset)


def split_entries(data: bytes) -> tuple[Entry, ...]:
    """Return the entries of an HVM context, HEADER and END included; bodies are not looked into.

    Raises:
        RecordError: the entries do not fill ``data`` exactly, or HEADER is not the first and END the last.
    """
    if len(data) > MAX_HVM_CONTEXT_BYTES:
        raise RecordError(f"{len(data)} bytes are more than {MAX_HVM_CONTEXT_BYTES}", record="HVM_CONTEXT")
    entries = tuple(_walk(data))
    if not entries or entries[0].typecode != Typecode.HEADER or entries[-1].typecode != Typecode.END:
        raise RecordError("the first entry is not HEADER or the last not END", record="HVM_CONTEXT")
    for entry in entries[1:-1]:
        if entry.typecode in (Typecode.HEADER, Typecode.END):
            raise entry.refusal("it may come only once")
    if entries[-1].body or entries[0].instance or entries[-1].instance:
        raise RecordError("HEADER or END has an instance, or END a body", record="HVM_CONTEXT")
    return entries


def _walk(data: bytes) -> Iterator[Entry]:
    offset = 0
    while offset < len(data):
        start = offset
        if len(data) - offset < ENTRY_HEADER.size:
            raise RecordError("an entry header is cut", record="HVM_CONTEXT", offset=start)
        typecode, instance, length = ENTRY_HEADER.unpack_from(data, offset)
        offset += ENTRY_HEADER.size
        entry = Entry(typecode=typecode, instance=instance, body=data[offset : offset + length], offset=start)
        if len(entry.body) != length:
            raise entry.refusal(f"a body of {length} bytes goes past the end")
        yield entry
        offset += length


def join_entries(entries: Iterable[Entry]) -> bytes:
    """Return the context that :func:`split_entries` takes apart."""
    return b"".join(
        ENTRY_HEADER.pack(entry.typecode, entry.instance, len(entry.body)) + entry.body for entry in entries
    )
