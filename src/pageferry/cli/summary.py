"""The summary of a finished migration: facts, rounds and downtime as bars, and an explanation in words."""

from typing import Any

from rich.bar import Bar
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pageferry.cli.printable import printable
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.units import format_duration, format_size

_PICTURE_WIDTH = 48
_TEXT_WIDTH = 90

Json = dict[str, Any]


def summary(report: Json) -> Group:
    """Return the tables and the picture of a finished migration; its warnings were shown when they came up."""
    facts = Table.grid(padding=(0, 2))
    sent_bytes = sum(each["sent_bytes"] for each in report["rounds"])
    rows = [
        ("guest", f"{format_size(report['memory_bytes'])}, {_whereabouts(report)}"),
        (
            "machines",
            f"{report['source_accel']} → {report['destination_accel'] or 'file'}, tracker {report['tracker']}",
        ),
        ("policy", f"{report['policy']}: {report['reason']}"),
        ("total", format_duration(report["total_s"])),
        ("sent", f"{format_size(sent_bytes)} in {len(report['rounds'])} rounds{_zeros(report)}{_packed(report)}"),
        ("verified", _verified(report)),
    ]
    if report["postcopy"] is not None:
        rows.append(("post-copy", _postcopy(report["postcopy"])))
    if report["state_bytes"] is not None:
        rows.append(("state", _state(report)))
    if report["fault_count"] is not None:
        rows.append(("write faults", f"{report['fault_count']:,} taken to find dirty pages"))
    for name, value in rows:
        facts.add_row(Text(name, style="bold"), value)
    parts: list[Any] = [facts]
    if report["rounds"]:
        parts += [Text(), _timeline(report)]
    if report["downtime_s"] is not None:
        parts += [Text(), _downtime(report)]
    what = "migration" if report["file"] is None else "save"
    if lines := _sentences(report):
        parts += [Text(), _in_words(lines)]
    return Group(Panel(Group(*parts), title=f"{what} {report['status']}", expand=False))


def _whereabouts(report: Json) -> str:
    if report["file"] is None:
        return f"now at the {report['guest_at']}"
    here = "runs on" if report["guest_at"] == "source" else "is stopped"
    return f"saved to {printable(report['file'])}; here it {here}"


def _postcopy(postcopy: Json) -> str:
    cuts = f"; {postcopy['cuts']} cuts, {format_duration(postcopy['cut_s'])}" if postcopy["cuts"] else ""
    waits = ""
    if postcopy["waits"] is not None:
        waits = f", {postcopy['waits']:,} waits for one"
    if postcopy["waits"]:
        waits += (
            f", {format_duration(postcopy['waited_s'])} in all, none over {format_duration(postcopy['longest_wait_s'])}"
        )
    when = f"after the switch in {format_duration(postcopy['duration_s'])}"
    return f"{postcopy['sent_pages']:,} pages came {when}{waits}{cuts}"


def _zeros(report: Json) -> str:
    zero_pages = sum(each["zero_pages"] for each in report["rounds"])
    return f", {zero_pages:,} zero pages by name only" if zero_pages else ""


def _packed(report: Json) -> str:
    said = ""
    for name, how in (("packed", f"packed by {report['compress']}"), ("delta", "sent as changes")):
        pages = sum(each[f"{name}_pages"] for each in report["rounds"])
        taken = sum(each[f"{name}_bytes"] for each in report["rounds"])
        said += f", {format_size(pages * PAGE_SIZE)} {how} in {format_size(taken)}" if pages else ""
    return said


def lessons(report: Json) -> list[str]:
    """Return what was seen of a migration that its policy gave up; the advice is the error's hint."""
    words = report["explanation"]
    if words is None or not words["advice"]:
        return []
    return [line for line in _sentences(report) if line not in words["advice"]]


def _sentences(report: Json) -> list[str]:
    words = report["explanation"]
    if words is None:
        return []
    return [line for part in ("rates", "guest_time", "hot", "advice") for line in words[part]]


def _in_words(lines: list[str]) -> Table:
    table = Table.grid()
    table.add_column(max_width=_TEXT_WIDTH)
    table.add_row(Text("in words", style="bold"))
    for line in lines:
        table.add_row(Text(line))
    return table


def _verified(report: Json) -> str:
    if not report["verified"]:
        return "no"
    if report["shared_memory"]:
        return "no page was copied: the destination has the same memory, and looked at some of it"
    proven = f"yes: all {report['verified_pages']:,} pages with content are equal, and nothing else is there"
    if not report["audited_pages"]:
        return proven
    share = report["audited_pages"] / report["verified_pages"]
    return f"{proven}; {share:.1%} proven while the guest ran, the rest at the pause"


def _state(report: Json) -> str:
    devices = report["devices"]
    size_bytes = sum(each["size_bytes"] for each in devices)
    save_s = sum(each["save_ns"] or 0 for each in devices) / 1e9
    return (
        f"{format_size(report['state_bytes'])}, of which {format_size(size_bytes)} "
        f"of {len(devices)} devices, saved in {format_duration(save_s)}"
    )


def _timeline(report: Json) -> Table:
    rows = [
        ("stop-and-copy" if each["final"] else f"round {each['index']}", each["sent_pages"], each["duration_s"])
        for each in report["rounds"]
    ]
    if (postcopy := report["postcopy"]) is not None:
        rows.append(("post-copy", postcopy["sent_pages"], postcopy["duration_s"]))
    span = sum(duration_s for _, _, duration_s in rows) or 1.0
    table = Table.grid(padding=(0, 1))
    table.add_row(Text("rounds over time", style="bold"), "", "", "")
    at = 0.0
    for label, pages, duration_s in rows:
        end = at + duration_s
        color = _color(label == "stop-and-copy")
        bar = Bar(span, at, max(end, at + span / _PICTURE_WIDTH / 4), width=_PICTURE_WIDTH, color=color)
        table.add_row(label, bar, f"{pages:>9,} pages", format_duration(duration_s).rjust(9))
        at = end
    return table


def _downtime(report: Json) -> Table:
    total_s = report["downtime_s"]
    table = Table.grid(padding=(0, 1))
    table.add_row(Text("downtime", style="bold"), "", Text(format_duration(total_s).rjust(9), style="bold"))
    at = 0.0
    for name, part_s in report["downtime_parts_s"].items():
        bar = Bar(max(total_s, 1e-9), at, at + part_s, width=_PICTURE_WIDTH, color=_color(True))
        table.add_row(name.ljust(13), bar, format_duration(part_s).rjust(9))
        at += part_s
    return table


def _color(final: bool) -> str:
    return "red" if final else "green"
