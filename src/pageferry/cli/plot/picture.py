"""The numbers of a report, in the shape of the pictures drawn from it."""

from dataclasses import dataclass
from typing import Any

from pageferry.core.frames import PAGE_SIZE
from pageferry.core.units import format_duration, format_size

Json = dict[str, Any]

#: At most about so many labels fit along the heat map.
_LABELS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A round, or post-copy: when it was, in seconds since the migration began, and what it moved.

    ``dirty_bytes_per_s``: what was dirty at its end by its length; None for the stop-and-copy, when nothing writes, and
    for post-copy, when it is not followed.
    ``throttle``: the share of its time for which the guest was throttled, 0 to 1.
    """

    label: str
    began_s: float
    ended_s: float
    sent_pages: int
    sent_bytes_per_s: float
    dirty_bytes_per_s: float | None
    throttle: float
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the downtime; ``began_s`` since the pause."""

    name: str
    began_s: float
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """Which pages were sent how often, by row (rounds, post-copy) and cell (place); what was not sent is left out.

    ``cell_pages``: how many sent pages a cell has, on average. ``shares[r][i]``: the share of those of cell i that each
    round of row r sent. ``times[i]``: how often a page of cell i was sent, on average. ``breaks``: cells that do not
    follow the one before them in memory. ``ticks``: cell and address, few enough to be read.
    """

    cell_pages: float
    cells: tuple[str, ...]
    rows: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]
    sent: tuple[tuple[int, ...], ...]
    times: tuple[float, ...]
    breaks: tuple[int, ...]
    ticks: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Everything that is drawn, and the words beside it."""

    title: str
    subtitle: str
    words: tuple[str, ...]
    bars: tuple[Bar, ...]
    paused_at_s: float | None
    total_s: float
    parts: tuple[Part, ...]
    heat: Heat
    report: Json


def picture(report: Json) -> Picture:
    """Return what is to be drawn of a report, as JSON-ready values."""
    size = format_size(report["memory_bytes"])
    there = report["destination_accel"] or "nowhere"
    facts = [
        f"{size} from {report['source_accel']} to {there}",
        f"tracker {report['tracker']}",
        f"policy {report['policy']}",
        f"{format_duration(report['total_s'])} in total",
    ]
    if report["downtime_s"] is not None:
        facts.append(f"{format_duration(report['downtime_s'])} down")
    words = report["explanation"] or {}
    return Picture(
        title=f"Migration {report['status']}, guest at {report['guest_at']}",
        subtitle=", ".join(facts),
        words=(words["outcome"], *words["rates"], *words["guest_time"], *words["hot"], *words["advice"])
        if words
        else (),
        bars=_bars(report),
        paused_at_s=report["paused_at_s"],
        total_s=report["total_s"],
        parts=_parts(report),
        heat=_heat(report),
        report=report,
    )


def _bars(report: Json) -> tuple[Bar, ...]:
    bars = []
    for index, stats in enumerate(report["rounds"]):
        duration_s = stats["duration_s"]
        if stats["final"]:
            began_s = report["paused_at_s"] + (report["downtime_parts_s"] or {}).get("pause", 0.0)
            throttle = 0.0
        elif index < len(report["round_ends"]):
            end = report["round_ends"][index]
            began_s, throttle = end["ended_s"] - duration_s, end["throttle"]
        else:
            continue  # a round whose end the policy never saw
        per_s = 1.0 / duration_s if duration_s > 0 else 0.0
        bars.append(
            Bar(
                label="stop-and-copy" if stats["final"] else f"round {stats['index']}",
                began_s=began_s,
                ended_s=began_s + duration_s,
                sent_pages=stats["sent_pages"],
                sent_bytes_per_s=stats["sent_bytes"] * per_s,
                dirty_bytes_per_s=None if stats["final"] else stats["remaining_pages"] * PAGE_SIZE * per_s,
                throttle=throttle,
                final=stats["final"],
            )
        )
    return (*bars, *_postcopy_bar(report))


def _postcopy_bar(report: Json) -> tuple[Bar, ...]:
    postcopy = report["postcopy"]
    if postcopy is None:
        return ()
    sent_bytes = (postcopy["sent_pages"] - postcopy["zero_pages"]) * PAGE_SIZE
    return (
        Bar(
            label="post-copy",
            began_s=report["total_s"] - postcopy["duration_s"],
            ended_s=report["total_s"],
            sent_pages=postcopy["sent_pages"],
            sent_bytes_per_s=sent_bytes / postcopy["duration_s"] if postcopy["duration_s"] > 0 else 0.0,
            dirty_bytes_per_s=None,
            throttle=0.0,
            final=False,
        ),
    )


def _parts(report: Json) -> tuple[Part, ...]:
    parts, at_s = [], 0.0
    for name, duration_s in (report["downtime_parts_s"] or {}).items():
        parts.append(Part(name=name, began_s=at_s, duration_s=duration_s))
        at_s += duration_s
    return tuple(parts)


def _heat(report: Json) -> Heat:
    heat, rounds = report["sent"]["heat"], report["rounds"]
    per_row, pages, firsts, lasts = heat["rounds_per_row"], heat["pages"], heat["first_gfns"], heat["last_gfns"]
    shares = []
    for row, sent in enumerate(heat["rows"]):
        rounds_here = max(1, min(per_row, len(rounds) - row * per_row))  # more were begun than ended: the last one
        shares.append(tuple(min(1.0, each / of / rounds_here) for each, of in zip(sent, pages, strict=True)))
    totals = [sum(column) for column in zip(*heat["rows"], strict=True)]
    breaks = tuple(index for index in range(1, len(firsts)) if firsts[index] > lasts[index - 1] + 1)
    return Heat(
        cell_pages=sum(pages) / len(pages) if pages else 0.0,
        cells=tuple(f"gfn {first:#x} to {last:#x}" for first, last in zip(firsts, lasts, strict=True)),
        rows=tuple(_row_label(row, per_row, rounds) for row in range(len(heat["rows"]))),
        shares=tuple(shares),
        sent=tuple(tuple(row) for row in heat["rows"]),
        times=tuple(total / of for total, of in zip(totals, pages, strict=True)),
        breaks=breaks,
        ticks=_ticks(firsts, breaks),
    )


def _row_label(row: int, per_row: int, rounds: list[Json]) -> str:
    if row * per_row >= len(rounds) > 0 and rounds[-1]["final"]:
        return "post-copy"
    if per_row > 1:
        return f"rounds {row * per_row} to {min((row + 1) * per_row, max(len(rounds), row * per_row + 1)) - 1}"
    return "stop-and-copy" if row < len(rounds) and rounds[row]["final"] else f"round {row}"


def _ticks(firsts: list[int], breaks: tuple[int, ...]) -> tuple[tuple[int, str], ...]:
    """Return cells to be labelled with their address: where areas begin if these are few, else evenly."""
    at_least = max(1.0, len(firsts) / _LABELS)
    wanted = [0, *breaks] if len(breaks) < _LABELS else []
    chosen: list[int] = []
    for cell in sorted(
        {*wanted, *range(0, len(firsts), -(-len(firsts) // _LABELS) or 1)}, key=lambda c: (c not in wanted, c)
    ):
        if all(abs(cell - other) >= at_least for other in chosen):
            chosen.append(cell)
    return tuple((cell, format_size(firsts[cell] * PAGE_SIZE)) for cell in sorted(chosen) if firsts)
