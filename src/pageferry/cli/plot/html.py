"""The picture as a self-contained page: SVG and text in one HTML file, no script, nothing fetched."""

import html
import json
import math

from pageferry.cli.plot.picture import Bar, Heat, Part, Picture
from pageferry.core.units import format_duration, format_size

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 118, 24, 12, 42
_INNER = _WIDTH - _LEFT - _RIGHT
#: Rows become thinner as they become more; labels are left out then.
_ROWS_HEIGHT, _MAX_ROW, _MIN_ROW, _LABEL_HEIGHT = 320, 24, 4, 13
_RATE_HEIGHT, _STRIP_HEIGHT, _LEGEND_STEPS = 200, 46, 10
#: Cells are shaded in so many steps, and overlap by so much: no light line is left between two of them.
_SHADES, _OVERLAP = 20, 0.4

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1b1f24; --dim: #5c6670; --line: #d5dae0;
        --sent: #1f6fd1; --dirty: #c2570c; --stop: #c4283c; --hold: #8a5cc9; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #e6e9ec; --dim: #9aa5b1; --line: #363d45;
        --sent: #66a8ff; --dirty: #ff9d4d; --stop: #ff6b7d; --hold: #b994f0; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 960px; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
p.facts, p.note { color: var(--dim); margin: .1rem 0 .5rem; } li { margin: .15rem 0; }
svg { width: 100%; height: auto; display: block; overflow: visible; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } svg text.dim { fill: var(--dim); }
.grid { stroke: var(--line); stroke-width: 1; } .break { stroke: var(--dim); stroke-dasharray: 2 3; }
.sent { fill: var(--sent); } .stop { fill: var(--stop); } .hold { fill: var(--hold); } .dirty { fill: var(--dirty); }
.pause { fill: var(--stop); opacity: .12; }
path { fill: none; stroke-width: 2; } path.sent { stroke: var(--sent); fill: none; }
path.dirty { stroke: var(--dirty); fill: none; stroke-dasharray: 6 3; }
rect { shape-rendering: crispEdges; } rect:hover { stroke: var(--text); stroke-width: 1; }
""" + "\n".join(
    f".h{step} {{ fill: color-mix(in srgb, var(--sent) {100 * step // _SHADES}%, var(--page)); }}"
    for step in range(_SHADES + 1)
)


def page(drawn: Picture) -> bytes:
    """Return the page, as UTF-8."""
    words = "".join(f"<li>{html.escape(line)}</li>" for line in drawn.words)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(drawn.title)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{html.escape(drawn.title)}</h1><p class="facts">{html.escape(drawn.subtitle)}</p>',
        f"<ul>{words}</ul>" if words else "",
        "<h2>Rounds over time</h2>",
        _note(
            "a bar a round; violet: the guest was throttled for a part of it; red: stop-and-copy; shaded: it stands "
            "still; post-copy: what came while it ran at the destination"
        ),
        _timeline(drawn) if drawn.bars else _note("No round was made."),
        "<h2>Dirty against sent rate</h2>",
        _note("solid blue: sent; dashed orange: dirtied, distinct pages at the end of each round by its length"),
        _rates(drawn.bars) if drawn.bars else _note("No round was made."),
        "<h2>Downtime and its parts</h2>",
        _downtime(drawn.parts) if drawn.parts else _note("The guest has not moved."),
        "<h2>Which pages were sent how often</h2>",
        _heat_map(drawn.heat) if drawn.heat.cells else _note("No page was sent."),
        f'<script type="application/json" id="report">{_json(drawn)}</script></body></html>\n',
    ]
    return "\n".join(filter(None, parts)).encode()


def _json(drawn: Picture) -> str:
    return json.dumps(drawn.report).replace("<", "\\u003c")  # nothing in it may end the script element


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _svg(height: float, name: str, *parts: str) -> str:
    label = html.escape(name, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str, more: str = "") -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.6):.2f}" height="{height:.2f}"'
    return f'<rect {place} class="{kind}"{more}><title>{html.escape(title)}</title></rect>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _steps(end: float) -> list[float]:
    """Return round values from 0 to at least most of ``end``, five or so."""
    if end <= 0:
        return [0.0]
    rough = end / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * index for index in range(int(end / step * (1 + 1e-9)) + 1)]


def _time_axis(end_s: float, top: float, bottom: float) -> str:
    parts = []
    for at_s in _steps(end_s):
        x = _LEFT + _INNER * at_s / end_s if end_s > 0 else _LEFT
        label = "0" if not at_s else format_duration(at_s)
        parts += [_line(x, top, x, bottom), _text(x, bottom + 18, label, kind="dim")]
    return "".join(parts)


def _row_height(rows: int) -> float:
    return max(_MIN_ROW, min(_MAX_ROW, _ROWS_HEIGHT / rows))


def _labels(names: list[str], height: float) -> str:
    every = max(1, math.ceil(_LABEL_HEIGHT / height))
    return "".join(
        _text(_LEFT - 8, _TOP + (row + 0.5) * height + 4, name, anchor="end")
        for row, name in enumerate(names)
        if row % every == 0
    )


def _timeline(drawn: Picture) -> str:
    height = _row_height(len(drawn.bars))
    bottom = _TOP + height * len(drawn.bars)
    end_s = max(drawn.total_s, *(bar.ended_s for bar in drawn.bars))
    scale = _INNER / end_s if end_s > 0 else 0.0
    parts = [_time_axis(end_s, _TOP, bottom), _labels([bar.label for bar in drawn.bars], height)]
    if drawn.paused_at_s is not None and drawn.parts:
        down_s = sum(part.duration_s for part in drawn.parts)
        title = f"downtime: {format_duration(down_s)}"
        x = _LEFT + drawn.paused_at_s * scale
        parts.append(_rect(x, _TOP, down_s * scale, bottom - _TOP, "pause", title))
    for row, bar in enumerate(drawn.bars):
        kind = "stop" if bar.final else "hold" if bar.throttle else "sent"
        x, width = _LEFT + bar.began_s * scale, (bar.ended_s - bar.began_s) * scale
        parts.append(_rect(x, _TOP + row * height + 1, width, height - 2, kind, _bar_title(bar)))
    return _svg(bottom + _BOTTOM, "rounds over time", *parts)


def _bar_title(bar: Bar) -> str:
    title = f"{bar.label}: {bar.sent_pages:,} pages in {format_duration(bar.ended_s - bar.began_s)}"
    return f"{title}, the guest throttled for {bar.throttle:.0%}" if bar.throttle else title


def _rates(bars: tuple[Bar, ...]) -> str:
    first_s, last_s = bars[0].began_s, max(bar.ended_s for bar in bars)
    span_s = last_s - first_s or 1.0
    rates = [rate for bar in bars for rate in (bar.sent_bytes_per_s, bar.dirty_bytes_per_s or 0.0)]
    highest = max(*rates, 1.0)
    bottom = _TOP + _RATE_HEIGHT

    def x(at_s: float) -> float:
        return _LEFT + _INNER * (at_s - first_s) / span_s

    def y(rate: float) -> float:
        return bottom - _RATE_HEIGHT * rate / highest

    parts = []
    unit = 1 << (10 * (int(math.log2(highest)) // 10))
    for value in _steps(highest / unit):
        parts += [_line(_LEFT, y(value * unit), _LEFT + _INNER, y(value * unit))]
        parts += [_text(_LEFT - 8, y(value * unit) + 4, f"{format_size(value * unit)}/s", anchor="end", kind="dim")]
    sent = [(bar.began_s, bar.ended_s, bar.sent_bytes_per_s) for bar in bars]
    dirty = [(bar.began_s, bar.ended_s, bar.dirty_bytes_per_s) for bar in bars if bar.dirty_bytes_per_s is not None]
    for kind, steps in (("sent", sent), ("dirty", dirty)):
        path = " ".join(
            f"M{x(began):.1f} {y(rate):.1f}H{max(x(ended), x(began) + 2):.1f}" for began, ended, rate in steps
        )
        parts.append(f'<path class="{kind}" d="{path}"/>')
    for bar in bars:  # what the pointer meets: a whole column a round
        dirtied = "" if bar.dirty_bytes_per_s is None else f", dirtied {format_size(bar.dirty_bytes_per_s)}/s"
        title = f"{bar.label}: sent {format_size(bar.sent_bytes_per_s)}/s{dirtied}"
        width = x(bar.ended_s) - x(bar.began_s)
        parts.append(_rect(x(bar.began_s), _TOP, width, _RATE_HEIGHT, "sent", title, ' fill-opacity="0.06"'))
    for at_s in _steps(span_s):
        at = x(first_s + at_s)
        parts.append(_text(at, bottom + 18, f"+{format_duration(at_s)}" if at_s else "begin of round 0", kind="dim"))
    return _svg(bottom + _BOTTOM, "dirty against sent rate", *parts)


def _downtime(steps: tuple[Part, ...]) -> str:
    total_s = sum(part.duration_s for part in steps)
    scale = _INNER / total_s if total_s > 0 else 0.0
    bottom = _TOP + _MAX_ROW * len(steps)
    parts = [_time_axis(total_s, _TOP, bottom), _labels([part.name for part in steps], _MAX_ROW)]
    for row, part in enumerate(steps):
        x, width, y = _LEFT + part.began_s * scale, part.duration_s * scale, _TOP + row * _MAX_ROW
        label = f"{format_duration(part.duration_s)}, {part.duration_s / total_s if total_s else 0:.0%}"
        parts.append(_rect(x, y + 2, width, _MAX_ROW - 4, "stop", f"{part.name}: {label}"))
        inside = x + width / 2 > _LEFT + _INNER / 2  # on the side where there is room
        at, anchor = (x - 6, "end") if inside else (x + width + 6, "start")
        parts.append(_text(at, y + _MAX_ROW / 2 + 4, label, anchor=anchor))
    return _svg(bottom + _BOTTOM, "downtime and its parts", *parts)


def _heat_map(heat: Heat) -> str:
    width = _INNER / len(heat.cells)
    height = _row_height(len(heat.rows))
    bottom = _TOP + height * len(heat.rows)
    parts = [_labels(list(heat.rows), height)]
    for row, shares in enumerate(heat.shares):
        for cell, share in enumerate(shares):
            if share:
                title = f"{heat.cells[cell]}, {heat.rows[row]}: {heat.sent[row][cell]:,} pages sent, {share:.0%}"
                place = (_LEFT + cell * width, _TOP + row * height, width + _OVERLAP, height + _OVERLAP)
                parts.append(_rect(*place, _shade(share), title))
    parts += [_line(_LEFT, bottom, _LEFT + _INNER, bottom), _strip(heat, width, bottom + 10)]
    end = bottom + 10 + _STRIP_HEIGHT
    for cell in heat.breaks:
        parts.append(_line(_LEFT + cell * width, _TOP, _LEFT + cell * width, end, "break"))
    for cell, address in heat.ticks:
        x = _LEFT + cell * width
        parts += [_line(x, end, x, end + 5), _text(x, end + 19, address, anchor="start", kind="dim")]
    note = (
        f"across: the pages that were sent, by address, {heat.cell_pages:.0f} a cell; dotted lines: memory left out; "
        "below: how often each page was sent, on average"
    )
    return _note(note) + _svg(end + _BOTTOM, "which pages were sent how often", *parts) + _legend()


def _shade(share: float) -> str:
    """Return the class of a share's shade: by its root, so that a little is told from nothing."""
    return f"h{math.ceil(_SHADES * math.sqrt(share))}"


def _strip(heat: Heat, width: float, top: float) -> str:
    most = max(heat.times)
    parts = [_text(_LEFT - 8, top + 11, f"{most:.3g} times", anchor="end", kind="dim")]
    for cell, times in enumerate(heat.times):
        height = _STRIP_HEIGHT * times / most
        title = f"{heat.cells[cell]}: each page sent {times:.3g} times on average"
        place = (_LEFT + cell * width, top + _STRIP_HEIGHT - height, width + _OVERLAP, height)
        parts.append(_rect(*place, "dirty", title))
    return "".join(parts)


def _legend() -> str:
    parts = [_text(_LEFT - 8, 12, "share sent", anchor="end", kind="dim")]
    for step in range(_LEGEND_STEPS + 1):
        share = step / _LEGEND_STEPS
        x = _LEFT + step * 44
        parts += [_rect(x, 0, 44, 14, _shade(share), f"{share:.0%}"), _text(x + 22, 28, f"{share:.0%}", kind="dim")]
    return _svg(34, "how the shades are to be read", *parts)
