"""Many moves of one guest by several monitors, summed up: medians, spread, ratios, targets."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pageferry.core.units import format_duration, format_size

from .move import Move

UNKNOWN = "-"
TOTAL, DOWNTIME, CPU = "total time", "downtime, at the guest", "processor time without vCPUs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number of a move. ``target``: the most that ours may be of the best other's; None: only told."""

    name: str
    of: Callable[[Move], float | None]
    show: Callable[[float], str]
    target: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The most that our total time, downtime at the guest and processor time may be of the best other's."""

    total: float
    downtime: float
    cpu: float


def measures(targets: Targets) -> tuple[Measure, ...]:
    """Return what is compared, in the order of the table."""
    return (
        Measure(name=TOTAL, of=lambda m: m.total_s, show=format_duration, target=targets.total),
        Measure(name=DOWNTIME, of=lambda m: m.gap_s, show=format_duration, target=targets.downtime),
        Measure(name="downtime, as reported", of=lambda m: m.downtime_s, show=format_duration),
        Measure(name="of it verification", of=lambda m: m.verify_s, show=format_duration),
        Measure(name=CPU, of=lambda m: m.cpu_s, show=format_duration, target=targets.cpu),
        Measure(name="processor time of vCPUs", of=lambda m: m.vcpu_s, show=format_duration),
        Measure(name="sent", of=lambda m: m.sent_bytes, show=format_size),
        Measure(name="peak memory, both ends", of=lambda m: m.peak_bytes, show=format_size),
    )


#: A migration is to reach this share of a plain socket copy's throughput, at least.
PLAIN_TARGET = 0.8
#: Verification may take this share of our own total time.
VERIFY_SHARE_TARGET = 0.15


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some numbers, and between what they lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Return the spread of values, or None of none."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One line: each monitor's spread, ours first; the ratio of ours to the best other's, pair by pair; the verdict."""

    measure: str
    spreads: tuple[Spread | None, ...]
    cells: tuple[str, ...]
    ratio: Spread | None
    target: float | None

    @property
    def met(self) -> bool | None:
        """Whether the median ratio keeps the target; None: there is no target, or nothing to compare."""
        return None if self.target is None or self.ratio is None else self.ratio.median <= self.target

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        spreads = [None if s is None else {"median": s.median, "min": s.low, "max": s.high} for s in self.spreads]
        ratio = (
            None if self.ratio is None else {"median": self.ratio.median, "min": self.ratio.low, "max": self.ratio.high}
        )
        return {"measure": self.measure, "spreads": spreads, "ratio": ratio, "target": self.target, "met": self.met}


def compare(rows: Sequence[Sequence[Move | None]], targets: Targets) -> list[Comparison]:
    """Compare monitors.

    Args:
        rows: one per repetition: a move by each monitor, ours first; None where it did not come about.
        targets: of this guest.
    """
    return [
        *(_compare(rows, measure) for measure in measures(targets)),
        _verification_share(rows, "total time", lambda move: move.total_s, VERIFY_SHARE_TARGET),
        _verification_share(rows, "downtime", lambda move: move.downtime_s, None),
    ]


def _values(rows: Sequence[Sequence[Move | None]], measure: Measure) -> list[list[float | None]]:
    return [[None if move is None else measure.of(move) for move in row] for row in rows]


def _compare(rows: Sequence[Sequence[Move | None]], measure: Measure) -> Comparison:
    table = _values(rows, measure)
    spreads = tuple(Spread.of([value for value in column if value is not None]) for column in zip(*table, strict=True))
    return Comparison(
        measure=measure.name,
        spreads=spreads,
        cells=tuple(_cell(spread, measure.show) for spread in spreads),
        ratio=Spread.of([ours / best for ours, best in _pairs(table)]),
        target=measure.target,
    )


def _pairs(table: Sequence[Sequence[float | None]]) -> list[tuple[float, float]]:
    """Return (ours, the best other's) of each row that has both, and a best that is not 0."""
    pairs = []
    for ours, *others in table:
        best = min((value for value in others if value is not None), default=None)
        if ours is not None and best:
            pairs.append((ours, best))
    return pairs


def _verification_share(
    rows: Sequence[Sequence[Move | None]], whole: str, of: Callable[[Move], float], target: float | None
) -> Comparison:
    moves = [row[0] for row in rows]
    shares = [move.verify_s / of(move) for move in moves if move is not None and move.verify_s is not None]
    spread = Spread.of(shares)
    others = len(rows[0]) - 1
    return Comparison(
        measure=f"verification, share of {whole}",
        spreads=(spread, *[None] * others),
        cells=(_cell(spread, "{:.1%}".format), *[UNKNOWN] * others),
        ratio=spread,
        target=target,
    )


def _cell(spread: Spread | None, show: Callable[[float], str]) -> str:
    if spread is None:
        return UNKNOWN
    return f"{show(spread.median)} ({show(spread.low)} to {show(spread.high)})"


def header(names: Sequence[str]) -> str:
    """Return the beginning of a table of monitors, ours first; :func:`lines` are the rest."""
    return _markdown([["guest", "", *names, "ratio", "target", ""], ["---"] * (len(names) + 5)])


def lines(title: str, rows: Sequence[Sequence[Move | None]], comparisons: Sequence[Comparison]) -> str:
    """Return a scenario's lines of the table: medians, in brackets the least and the most."""
    moved = [sum(move is not None for move in column) for column in zip(*rows, strict=True)]
    table = [[title, "moved", *(f"{count} of {len(rows)}" for count in moved), "", "", ""]]
    for line in comparisons:
        ratio = UNKNOWN if line.ratio is None else _cell(line.ratio, "{:.2f}".format)
        target = "" if line.target is None else f"{line.target:g}"
        verdict = {True: "met", False: "missed", None: ""}[line.met]
        table.append(["", line.measure, *line.cells, ratio, target, verdict])
    return _markdown(table)


def short_header() -> str:
    """Return the beginning of the README's table; :func:`short_line` are the rest."""
    return _markdown([["guest", "total time", "downtime at the guest", "processor time"], ["---"] * 4])


def short_line(title: str, comparisons: Sequence[Comparison]) -> str:
    """Return a scenario's line of the README's table: what has a target of QEMU's, and whether it is met."""
    cells = []
    for name in (TOTAL, DOWNTIME, CPU):
        (line,) = (each for each in comparisons if each.measure == name)
        ratio = UNKNOWN if line.ratio is None else f"{line.ratio.median:.2f}"
        verdict = {True: "met", False: "missed", None: "not measured"}[line.met]
        cells.append(f"{ratio} ({line.target:g}: {verdict})")
    return _markdown([[title, *cells]])


def _markdown(table: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def growth_table(sizes: Sequence[dict[str, Any]]) -> str:
    """Return a table of ``run_growth``'s sizes: medians, in brackets the least and the most."""
    shown = {
        "total time": ("total_s", format_duration),
        "downtime, at the guest": ("gap_s", format_duration),
        "of it verification": ("verify_s", format_duration),
        "processor time": ("cpu_s", format_duration),
        "peak memory, both ends": ("peak_bytes", format_size),
        "throughput, of a copy's": ("of_a_copy", "{:.2f}".format),
    }
    rows = [["memory", *shown, "target", ""], ["---"] * (len(shown) + 3)]
    for size in sizes:
        cells = [_cell(Spread(**size[key]), show) for key, show in shown.values()]
        verdict = "met" if size["of_a_copy"]["median"] >= PLAIN_TARGET else "missed"
        rows.append([format_size(size["memory_bytes"]), *cells, f"{PLAIN_TARGET:g}", verdict])
    return f"Idle guests, filled but for 32 MiB, against a plain socket copy:\n\n{_markdown(rows)}"
