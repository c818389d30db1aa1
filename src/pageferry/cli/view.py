"""What a person sees of a migration: a line per round while it runs, then the summary and the picture."""

from typing import Any

from rich.bar import Bar
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from pageferry.core.frames import PAGE_SIZE
from pageferry.core.units import format_duration, format_size
from pageferry.engine.attempt import HELD

_PICTURE_WIDTH = 48
_TEXT_WIDTH = 90

Json = dict[str, Any]


class ProgressView:
    """Follows the engine's events, as the control socket carries them; a context manager.

    Args:
        console: where to draw (standard error).
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TransferSpeedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._held = False

    def __enter__(self) -> "ProgressView":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, event: Json) -> None:
        """Show one event (``type`` and the fields of :mod:`pageferry.core.events`); others pass by."""
        kind = event["type"]
        if kind == "RoundBegan":
            label = "stop-and-copy" if event["final"] else f"round {event['index']}"
            self._task = self._bar.add_task(label, total=max(1, event["dirty_pages"]) * PAGE_SIZE, eta="")
        elif kind == "RoundProgress" and self._task is not None:
            eta = eta_in_words(event.get("eta_s"), event.get("eta_reason", ""))
            self._bar.update(self._task, completed=event["sent_pages"] * PAGE_SIZE, eta=eta)
        elif kind == "PostcopyProgress":
            self._show_late(event)
        elif kind == "Notice":
            self._console.print(event["text"], markup=False, highlight=False, soft_wrap=True)
        elif kind == "Status":
            self._hold(event["status"] == HELD)
        elif kind == "RoundEnded":
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            if not self._held:
                self._console.print(round_line(event["stats"], event["decision"]), highlight=False, soft_wrap=True)

    def _show_late(self, event: Json) -> None:
        if self._task is None:
            self._task = self._bar.add_task("post-copy", total=event["missing_pages"] * PAGE_SIZE, eta="")
        eta = eta_in_words(event["eta_s"], event["eta_reason"])
        self._bar.update(self._task, completed=event["sent_pages"] * PAGE_SIZE, eta=eta)

    def _hold(self, held: bool) -> None:
        if held and not self._held:
            self._console.print("held; `pageferry switch` lets it go on", highlight=False, soft_wrap=True)
        self._held = held


def eta_in_words(eta_s: float | None, reason: str) -> str:
    """Return when it will be over, and the reason if that was moved back or is not known."""
    words = "no end in sight" if eta_s is None else f"over in {format_duration(eta_s)}"
    return f"{words} ({reason})" if reason else words


class ReadingView:
    """A bar for pages that are read from a file; a context manager.

    Args:
        console: where to draw (standard error).
    """

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TransferSpeedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("reading", total=None)

    def __enter__(self) -> "ReadingView":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done_pages: int, pages: int) -> None:
        """Show how far it is."""
        self._bar.update(self._task, completed=done_pages * PAGE_SIZE, total=pages * PAGE_SIZE)


def round_line(stats: Json, decision: Json | None) -> str:
    """Return one line about a round that ended."""
    label = "stop-and-copy" if stats["final"] else f"round {stats['index']:<2}"
    rate = f"{format_size(stats['sent_bytes'] / stats['duration_s'])}/s" if stats["duration_s"] else "-"
    line = (
        f"{label:<14}{stats['sent_pages']:>9,} pages {format_size(stats['sent_bytes']):>10} "
        f"in {format_duration(stats['duration_s']):>9}  {rate:>13}"
    )
    if decision is not None:
        line += f"  {stats['remaining_pages']:>7,} dirty → {decision['action']}: {decision['reason']}"
    return line


def outlook_line(migration: Json) -> str:
    """Return one line about a migration under way: the answer to ``query-migrate``."""
    ram = migration["ram"]
    words = [
        f"migration {migration['status']}: {format_size(ram['remaining'])} remain",
        f"{format_size(ram['mbps'] * 1e6 / 8)}/s sent",
        f"{format_size(ram['dirty-pages-rate'] * PAGE_SIZE)}/s dirtied",
    ]
    if "expected-downtime" in migration:
        words.append(f"a pause now would take {migration['expected-downtime']} ms")
    return ", ".join([*words, eta_in_words(migration["x-eta-s"], migration["x-eta-reason"])])


def missing_line(guest: Json) -> str:
    """Return what it means that pages of a guest have not come yet: the answer to ``x-query-guest``."""
    pages = f"{guest['missing_pages']:,} pages ({format_size(guest['missing_pages'] * PAGE_SIZE)})"
    if not guest["waits_for_source"]:
        return f"{pages} are still coming from its source; if that process ends before, the guest is lost"
    return (
        f"the guest stands still: the connection to its source was cut, and {pages} are only there. At the source: "
        "pageferry migrate --recover. If that process has ended, the guest is lost: end this one by pageferry quit"
    )


def oracle_line(oracle: Json) -> str:
    """Return one line about what the tracker oracle compared: ``oracle`` of ``x-query-guest``."""
    rounds = f"{oracle['rounds']} round{'s' if oracle['rounds'] != 1 else ''}"
    return (
        f"oracle: {oracle['trackers']} agreed on {oracle['pages']:,} pages in {rounds}, "
        f"{oracle['spurious_primary']:,} + {oracle['spurious_witness']:,} spurious reports"
    )


def summary(report: Json) -> Group:
    """Return the tables and the picture of a finished migration."""
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


def _destination(report: Json) -> str:
    return str(report["destination_accel"]) if report["file"] is None else "file"


def _whereabouts(report: Json) -> str:
    if report["file"] is None:
        return f"now at the {report['guest_at']}"
    return f"saved to {report['file']}; here it {'runs on' if report['guest_at'] == 'source' else 'is stopped'}"


def _postcopy(postcopy: Json) -> str:
    cuts = f"; {postcopy['cuts']} cuts, {format_duration(postcopy['cut_s'])}" if postcopy["cuts"] else ""
    waits = f", {postcopy['urgent_pages']:,} of them were waited for"
    if postcopy["waits"]:
        waits += (
            f", {format_duration(postcopy['waited_s'])} in all, {format_duration(postcopy['longest_wait_s'])} at most"
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
    if (late := report["postcopy"]) is not None:
        rows.append(("post-copy", late["sent_pages"], late["duration_s"]))
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
