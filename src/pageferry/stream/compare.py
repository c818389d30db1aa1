"""What differs between two streams: pages, the CPU's description, and the state, register by register."""

from dataclasses import dataclass, field, fields
from typing import Any

from pageferry.core.errors import RecordError
from pageferry.core.state import VcpuState
from pageferry.stream.format import RECORD_HEADER
from pageferry.stream.hvm_context import decode_cpu
from pageferry.stream.hvm_entries import Entry, Typecode
from pageferry.stream.page_contents import PageContents, PageDifferences
from pageferry.stream.records import (
    CpuidPolicy,
    HvmContext,
    HvmParams,
    MsrPolicy,
    StreamHeader,
    TscInfo,
)
from pageferry.stream.walk import RecordSeen, context_entries


@dataclass(slots=True)
class Snapshot:
    """All of a stream that can be compared: pages as digests, everything else by name, as text or numbers."""

    pages: PageContents = field(default_factory=PageContents)
    values: dict[str, Any] = field(default_factory=dict)

    def take(self, seen: RecordSeen) -> None:
        """Add a record, of PAGE_DATA nothing: ``pages.take`` is for that."""
        self.values |= _values(seen)

    def differences(self, other: "Snapshot") -> tuple[PageDifferences, dict[str, tuple[Any, Any]]]:
        """Return what differs in a second stream: pages; and other values by name, (ours, theirs), None: not there."""
        names = dict.fromkeys([*self.values, *other.values])
        pairs = {name: (self.values.get(name), other.values.get(name)) for name in names}
        return self.pages.compare(other.pages), {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _values(seen: RecordSeen) -> dict[str, Any]:
    match seen.event:
        case StreamHeader() as header:
            return {"version": header.version, "xen": f"{header.xen_major}.{header.xen_minor}"}
        case CpuidPolicy() as policy:
            return {
                f"CPUID {row[0]:#x}.{row[1]:#x}": " ".join(f"{word:08x}" for word in row[2:]) for row in policy.leaves
            }
        case MsrPolicy() as msrs:
            return {f"MSR {entry.index:#x}": f"{entry.value:#x}" for entry in msrs.entries}
        case TscInfo() as tsc:
            return {f"TSC_INFO {part.name}": getattr(tsc, part.name) for part in fields(TscInfo)}
        case HvmParams() as params:
            return {f"HVM_PARAM {index}": f"{value:#x}" for index, value in params.params}
        case HvmContext() as context:
            values: dict[str, Any] = {}
            for entry in context_entries(context, seen.offset + RECORD_HEADER.size):
                values |= _entry_values(entry)
            return values
    return {}


def _entry_values(entry: Entry) -> dict[str, Any]:
    name = entry.name.removeprefix("HVM_CONTEXT ")
    if entry.typecode == Typecode.CPU:
        try:
            vcpu = decode_cpu(entry)
        except RecordError:
            return {name: entry.body.hex()}
        return {f"{name} {part.name}": _shown(getattr(vcpu, part.name)) for part in fields(VcpuState)}
    return {name: entry.body.hex()}


def _shown(value: Any) -> Any:  # noqa: ANN401  # a register of any kind
    if isinstance(value, bytes):
        return value.hex()
    return f"{value:#x}" if isinstance(value, int) else str(value)
