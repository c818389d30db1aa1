"""The picture drawn with matplotlib, as SVG or PNG."""

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from pageferry.cli.plot.picture import Picture
from pageferry.core.units import format_duration

_SENT, _DIRTY, _STOP, _HOLD, _DIM = "#1f6fd1", "#c2570c", "#c4283c", "#8a5cc9", "#5c6670"
_DPI = 110
#: More rows than this are not all labelled.
_LABELLED_ROWS = 20


def figure(drawn: Picture, file_format: str) -> bytes:
    """Return the picture's file.

    Args:
        drawn: what to draw.
        file_format: ``svg`` or ``png``.
    """
    sheet = Figure(figsize=(15, 9.5), layout="constrained")
    sheet.suptitle(f"{drawn.title}\n{drawn.subtitle}", fontsize=12)
    grid = sheet.add_gridspec(3, 3, height_ratios=(4, 4, 1))
    for place, name, draw, absent in (
        (grid[0, 0], "rounds over time", _timeline, "" if drawn.bars else "no round was made"),
        (grid[0, 1], "dirty against sent rate", _rates, "" if drawn.bars else "no round was made"),
        (grid[0, 2], "downtime and its parts", _downtime, "" if drawn.parts else "the guest has not moved"),
    ):
        axes = sheet.add_subplot(place)
        axes.set_title(name, fontsize=11)
        _or_absent(axes, draw, drawn, absent)
    axes = sheet.add_subplot(grid[1, :])
    axes.set_title("which pages were sent how often", fontsize=11)
    below = sheet.add_subplot(grid[2, :], sharex=axes)
    if drawn.heat.cells:
        _heat_map(sheet, axes, below, drawn)
    else:
        below.set_axis_off()
        _or_absent(axes, _timeline, drawn, "no page was sent")
    out = BytesIO()
    sheet.savefig(out, format=file_format, dpi=_DPI, metadata={"Date": None} if file_format == "svg" else None)
    return out.getvalue()


def _or_absent(axes: Any, draw: Any, drawn: Picture, absent: str) -> None:  # noqa: ANN401  # matplotlib has no types
    if absent:
        axes.set_axis_off()
        axes.text(0.5, 0.5, absent, ha="center", va="center", color=_DIM, transform=axes.transAxes)
    else:
        draw(axes, drawn)


def _rows(axes: Any, labels: list[str]) -> None:  # noqa: ANN401
    every = -(-len(labels) // _LABELLED_ROWS)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _timeline(axes: Any, drawn: Picture) -> None:  # noqa: ANN401
    if drawn.paused_at_s is not None and drawn.parts:
        down_s = sum(part.duration_s for part in drawn.parts)
        axes.axvspan(drawn.paused_at_s, drawn.paused_at_s + down_s, color=_STOP, alpha=0.12, lw=0)
    for row, bar in enumerate(drawn.bars):
        color = _STOP if bar.final else _HOLD if bar.throttle else _SENT
        axes.barh(row, bar.ended_s - bar.began_s, left=bar.began_s, height=0.8, color=color, edgecolor=color, lw=0.8)
    axes.set_xlim(0, max(drawn.total_s, *(bar.ended_s for bar in drawn.bars)))
    axes.set_xlabel("s since the migration began", fontsize=9)
    _rows(axes, [bar.label for bar in drawn.bars])


def _rates(axes: Any, drawn: Picture) -> None:  # noqa: ANN401
    mib = 1 << 20
    sent = [(bar.began_s, bar.ended_s, bar.sent_bytes_per_s) for bar in drawn.bars]
    dirty = [
        (bar.began_s, bar.ended_s, bar.dirty_bytes_per_s) for bar in drawn.bars if bar.dirty_bytes_per_s is not None
    ]
    for label, color, style, steps in (("sent", _SENT, "solid", sent), ("dirtied", _DIRTY, "dashed", dirty)):
        for index, (began_s, ended_s, rate) in enumerate(steps):
            axes.plot(
                (began_s, ended_s),
                (rate / mib, rate / mib),
                color=color,
                linestyle=style,
                marker=".",
                label=label if not index else None,
            )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB/s", fontsize=9)
    axes.set_xlabel("s since the migration began", fontsize=9)
    axes.legend(fontsize=8)


def _downtime(axes: Any, drawn: Picture) -> None:  # noqa: ANN401
    total_s = sum(part.duration_s for part in drawn.parts)
    for row, part in enumerate(drawn.parts):
        axes.barh(row, part.duration_s * 1e3, left=part.began_s * 1e3, height=0.8, color=_STOP, edgecolor=_STOP, lw=0.8)
        left = part.began_s + part.duration_s / 2 > total_s / 2
        at_s = part.began_s if left else part.began_s + part.duration_s
        text = f" {format_duration(part.duration_s)} "
        axes.text(at_s * 1e3, row, text, va="center", ha="right" if left else "left", fontsize=8)
    axes.set_xlim(0, total_s * 1e3 or 1.0)
    axes.set_xlabel("ms since the pause", fontsize=9)
    _rows(axes, [part.name for part in drawn.parts])


def _heat_map(sheet: Figure, axes: Any, below: Any, drawn: Picture) -> None:  # noqa: ANN401
    heat = drawn.heat
    cells = len(heat.cells)
    image = axes.imshow(
        np.array(heat.shares),
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        norm=PowerNorm(0.5, vmin=0.0, vmax=1.0),
        extent=(0, cells, len(heat.rows) - 0.5, -0.5),
    )
    sheet.colorbar(image, ax=[axes, below], label="share of the cell's pages sent in the round", pad=0.01)
    _rows(axes, list(heat.rows))
    axes.tick_params(axis="x", labelbottom=False, length=0)
    below.bar(np.arange(cells) + 0.5, heat.times, width=1.0, color=_DIRTY)
    for cell in heat.breaks:
        for each in (axes, below):
            each.axvline(cell, color=_DIM, lw=0.6, ls=":")
    below.set_xlim(0, cells)
    below.set_ylim(bottom=0)
    below.set_ylabel("times sent", fontsize=8)
    below.set_xticks([cell for cell, _ in heat.ticks], [address for _, address in heat.ticks], fontsize=8, ha="left")
    note = f"guest-physical address; {heat.cell_pages:.0f} pages a cell; memory of which nothing was sent is left out"
    below.set_xlabel(note, fontsize=9)
