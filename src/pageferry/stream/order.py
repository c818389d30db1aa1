"""Which record may come next: one table for x86 HVM, read by Encoder and Decoder alike.

A row says what must have come before the record, and what must not. What may come once is in its own ``never_after``.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from pageferry.stream.format import EXTENSIONS, RecordType, record_name

_R = RecordType


class Role(StrEnum):
    """Who keeps the order: a writer keeps a stricter one than a reader asks for."""

    WRITER = "writer"
    READER = "reader"
    SECTION = "section"
    """Both ends of a section: what a further connection carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When a record may come: all of ``after`` have come and none of ``never_after``."""

    after: tuple[RecordType, ...] = ()
    never_after: tuple[RecordType, ...] = ()


_STATE = (_R.TSC_INFO, _R.HVM_PARAMS, _R.HVM_CONTEXT)
_NEEDED = (_R.PAGE_DATA, _R.TSC_INFO, _R.HVM_CONTEXT)

#: (version, record) -> when it may come. A pair that is missing here may never come.
TABLE: dict[tuple[int, RecordType], Rule] = {
    (3, _R.CPUID_POLICY): Rule(never_after=(_R.CPUID_POLICY, _R.STATIC_DATA_END)),
    (3, _R.MSR_POLICY): Rule(never_after=(_R.MSR_POLICY, _R.STATIC_DATA_END)),
    (3, _R.STATIC_DATA_END): Rule(never_after=(_R.STATIC_DATA_END,)),
    (3, _R.PAGE_DATA): Rule(after=(_R.STATIC_DATA_END,), never_after=_STATE),
    (2, _R.PAGE_DATA): Rule(never_after=_STATE),
    (3, _R.AUDIT): Rule(after=(_R.PAGE_DATA,), never_after=_STATE),
    (3, _R.FENCE): Rule(after=(_R.PAGE_DATA,), never_after=_STATE),
    (3, _R.ZERO_PAGES): Rule(after=(_R.PAGE_DATA,), never_after=_STATE),
    (3, _R.PACKED_PAGES): Rule(after=(_R.STATIC_DATA_END,), never_after=_STATE),
    (3, _R.DELTA_PAGES): Rule(after=(_R.PAGE_DATA,), never_after=_STATE),
    **{(version, state): Rule(after=(_R.PAGE_DATA,), never_after=(state,)) for version in (2, 3) for state in _STATE},
    **{(version, _R.END): Rule(after=_NEEDED) for version in (2, 3)},
}
#: A section has pages and nothing else.
SECTION_TABLE: dict[tuple[int, RecordType], Rule] = {
    (3, _R.STATIC_DATA_END): Rule(never_after=(_R.STATIC_DATA_END,)),
    **{(3, record): Rule(after=(_R.STATIC_DATA_END,)) for record in (_R.PAGE_DATA, *EXTENSIONS, _R.END)},
}
#: What a role must have seen before END besides the table's row.
NEEDED_BEFORE_END: dict[Role, tuple[RecordType, ...]] = {Role.WRITER: (_R.HVM_PARAMS,)}


class Order:
    """Follows one stream record by record.

    Args:
        role: whose order.
        version: 2 or 3.
        agreed: the extensions that both ends agreed on.
    """

    __slots__ = ("_agreed", "_role", "_seen", "_version")

    def __init__(self, role: Role, version: int, agreed: Collection[RecordType] = ()) -> None:
        self._role = role
        self._version = version
        self._agreed = frozenset(agreed)
        self._seen: set[RecordType] = set()

    def check(self, record: RecordType) -> str | None:
        """Return why ``record`` may not come now, or None when it may; remembers nothing."""
        if RecordType.END in self._seen:
            return "nothing may come after END"
        if record in EXTENSIONS - self._agreed:
            return "it was not agreed on"
        rule = (SECTION_TABLE if self._role is Role.SECTION else TABLE).get((self._version, record))
        if rule is None:
            what = "section" if self._role is Role.SECTION else "stream"
            return f"a version {self._version} {what} of an x86 HVM guest has no such record"
        needed = rule.after
        if record is RecordType.END:
            needed = (*needed, *NEEDED_BEFORE_END.get(self._role, ()))
        if missing := [r for r in needed if r not in self._seen]:
            return f"it comes too early: {_names(missing)} not seen yet"
        if record in self._seen and record in rule.never_after:
            return "it may come only once"
        if past := [r for r in rule.never_after if r in self._seen]:
            return f"it comes too late: {_names(past)} seen already"
        return None

    def passed(self, record: RecordType) -> None:
        """Remember that ``record`` came; :meth:`check` had said that it may."""
        self._seen.add(record)
        if record is _R.PACKED_PAGES:
            self._seen.add(_R.PAGE_DATA)  # for what must come after that


def _names(records: Collection[RecordType]) -> str:
    return ", ".join(record_name(record) for record in records)
