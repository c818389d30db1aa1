"""``pageferry inspect``: a stream taken apart record by record, and two streams compared.

Both read in constant memory. A wrong stream is shown as far as it is right.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from pageferry.cli.streams import WrongStreamError, followed, opened, walked
from pageferry.core.bitmap import runs_of
from pageferry.core.errors import RemoteStreamError
from pageferry.core.frames import GfnArray
from pageferry.core.units import format_size
from pageferry.stream.diff import Snapshot
from pageferry.stream.walk import Read, RecordSeen
from pageferry.stream.xl import Envelope, Inside

Json = dict[str, Any]

_TRAILING = "bytes follow END; they are not part of the stream"
Libxl = tuple[str, int]
_PLACE = ("name", "offset", "body_bytes")
#: Runs of pages and characters of a value that a person is shown.
_SHOWN, _BRIEF = 16, 48


def print_json(name: str, read: Read, *, records: bool = True) -> None:
    """Print a stream as one JSON object.

    It has ``records``, each on a line, ``headers``, ``envelope`` (what Xen's tools have written around it, null if they
    have not), ``trailing`` (whether bytes follow its end), and ``error``, null if the stream is whole.

    Args:
        name: what to call it in errors.
        read: where its bytes come from.
        records: whether they are wanted.

    Raises:
        WrongStreamError: it is wrong; that was printed too.
    """
    wrong: WrongStreamError | None = None
    trailing: bool | None = None
    inside, after = Inside(read), list[Libxl]()
    print('{"records": [', end="")
    separator = "\n"
    headers: Json = {}
    try:
        for seen in walked(name, inside):
            if seen.index is None:
                headers = seen.details
            if seen.index is None or not records:
                continue
            record = {"index": seen.index, "offset": seen.offset, "type": seen.name, "body_bytes": seen.body_bytes}
            print(separator + json.dumps(record | seen.details), end="")
            separator = ",\n"
        after = _rest(name, inside)
        trailing = followed(name, inside)
    except WrongStreamError as error:
        wrong = error
    rest = {
        "headers": headers,
        "envelope": None if inside.envelope is None else inside.envelope.to_json() | {"records_after": after},
        "trailing": trailing,
        "error": None if wrong is None else wrong.to_json(),
    }
    print("\n], " + json.dumps(rest).removeprefix("{"))
    if wrong is not None:
        raise wrong


def print_verdict(name: str, read: Read, console: Console) -> None:
    """Print one line on a stream that is whole.

    Raises:
        WrongStreamError: it is not.
    """
    count, pages = 0, Counter[str]()
    inside = Inside(read)
    for seen in walked(name, inside):
        count += seen.index is not None
        pages.update(seen.details.get("pages", {}))
    _rest(name, inside)
    more = f"; {_TRAILING}" if followed(name, inside) else ""
    if inside.envelope is not None:
        more += f"; {_around(inside.envelope)}"
    console.print(f"{name}: whole, {count:,} records, {_counted(pages)}{more}", markup=False, soft_wrap=True)


def _counted(pages: Counter[str]) -> str:
    return "pages " + ", ".join(f"{count:,} {name}" for name, count in pages.items())


@dataclass(slots=True)
class _Pages:
    """Neighbouring PAGE_DATA records, shown as one line."""

    first: RecordSeen
    last: RecordSeen
    body_bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, seen: RecordSeen) -> None:
        self.last = seen
        self.body_bytes += seen.body_bytes
        self.counts.update(seen.details["pages"])

    def __str__(self) -> str:
        first, last = self.first.index, self.last.index
        records = f"{first}" if first == last else f"{first}-{last}"
        return _line(records, self.first, self.body_bytes, _counted(self.counts))


def print_table(name: str, read: Read, console: Console) -> None:
    """Print a stream for a person, neighbouring PAGE_DATA records as one line.

    Raises:
        WrongStreamError: it is wrong; what came before was printed.
    """
    pages: _Pages | None = None
    inside = Inside(read)
    headed = False
    try:
        for seen in walked(name, inside):
            if not headed:
                console.print(f"{'record':>13} {'offset':>14}  {'type':<16}{'body':>10}", style="bold")
                headed = True
            if seen.index is None and inside.envelope is not None:
                console.print(_around(inside.envelope), markup=False, soft_wrap=True)
            if seen.name == "PAGE_DATA":
                pages = pages or _Pages(first=seen, last=seen)
                pages.add(seen)
                continue
            if pages is not None:
                console.print(str(pages), soft_wrap=True)
                pages = None
            for line in _lines(seen):
                console.print(line, soft_wrap=True, markup=False)
    finally:
        if pages is not None:
            console.print(str(pages), soft_wrap=True)
    if after := _rest(name, inside):
        shown = ", ".join(f"{libxl} {format_size(size_bytes)}" for libxl, size_bytes in after)
        console.print(f"libxl records after it: {shown}", markup=False, soft_wrap=True)
    if followed(name, inside):
        console.print(_TRAILING)


def _around(envelope: Envelope) -> str:
    what = "a file of xl save" if envelope.kind == "xl" else "a libxl stream"
    domain = "".join(f", {key} {value}" for key, value in envelope.domain.items())
    return f"in {what}{domain}; its libxc stream begins at byte {envelope.begins_at:#x}, offsets count from there"


def _rest(name: str, inside: Inside) -> list[Libxl]:
    """Return the libxl records that follow a libxc stream which was walked to its END.

    Raises:
        WrongStreamError: they are wrong.
    """
    try:
        return inside.finish()
    except RemoteStreamError as error:
        raise WrongStreamError(name, error, None) from error


def _line(records: str, seen: RecordSeen, body_bytes: int, what: str) -> str:
    return f"{records:>13} {seen.offset:>#14x}  {seen.name:<16}{format_size(body_bytes):>10}  {what}".rstrip()


def _lines(seen: RecordSeen) -> Iterator[str]:
    details = seen.details
    entries = details.get("entries", []) if seen.name == "HVM_CONTEXT" else []
    shown = {key: value for key, value in details.items() if key != "entries" or not entries}
    what = ", ".join(f"{key} {_text(value)}" for key, value in shown.items())
    yield _line("" if seen.index is None else str(seen.index), seen, seen.body_bytes, what)
    for entry in entries:
        registers = " ".join(f"{key} {value}" for key, value in entry.items() if key not in _PLACE)
        size = format_size(entry["body_bytes"])
        yield f"{'':>13} {entry['offset']:>#14x}    {entry['name']:<14}{size:>10}  {registers}".rstrip()


def _text(value: Any) -> str:  # noqa: ANN401  # any JSON value
    if isinstance(value, list):
        return " ".join("/".join(map(hex, each)) if isinstance(each, list) else str(each) for each in value)
    return str(value)


def compared(first: str, second: str, console: Console) -> Json:
    """Compare two streams; JSON-ready.

    ``pages_only_first``, ``pages_only_second`` and ``pages_changed`` are lists of [first gfn, pages]; ``values`` has a
    pair by name for whatever else differs, null where a stream has it not; ``same`` tells whether nothing does.

    Raises:
        WrongStreamError: one of them is wrong.
    """
    ours, theirs = (_snapshot(name, console) for name in (first, second))
    pages, values = ours.differences(theirs)
    runs = {
        "pages_only_first": _runs(pages.only_first),
        "pages_only_second": _runs(pages.only_second),
        "pages_changed": _runs(pages.changed),
    }
    return {"same": not (values or any(runs.values())), **runs, "values": values}


def _snapshot(name: str, console: Console) -> Snapshot:
    snapshot = Snapshot()
    with opened(name, console) as read:
        inside = Inside(read)
        for seen in walked(name, inside, snapshot.pages.take):
            snapshot.take(seen)
        _rest(name, inside)
    return snapshot


def _runs(gfns: GfnArray) -> list[list[int]]:
    starts, lengths = runs_of(gfns)
    return list(map(list, zip(starts.tolist(), lengths.tolist(), strict=True)))


def print_differences(found: Json, first: str, second: str, console: Console) -> None:
    """Print what :func:`compared` found, for a person."""
    if found["same"]:
        console.print(f"{first} and {second} hold the same guest", markup=False, soft_wrap=True)
        return
    for key, what in (
        ("pages_only_first", f"only {first} has"),
        ("pages_only_second", f"only {second} has"),
        ("pages_changed", "both have, with other content,"),
    ):
        runs = found[key]
        if runs:
            shown = ", ".join(f"{gfn:#x}" + (f"-{gfn + n - 1:#x}" if n > 1 else "") for gfn, n in runs[:_SHOWN])
            more = f" and {len(runs) - _SHOWN} more runs" if len(runs) > _SHOWN else ""
            total = sum(pages for _, pages in runs)
            console.print(f"{what} {total:,} pages: gfn {shown}{more}", markup=False, soft_wrap=True)
    for name, (ours, theirs) in found["values"].items():
        console.print(f"{name}: {_brief(ours)} -> {_brief(theirs)}", markup=False, soft_wrap=True)


def _brief(value: Any) -> str:  # noqa: ANN401  # any JSON value
    text = "nothing" if value is None else str(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}... ({len(text) // 2} bytes)"
