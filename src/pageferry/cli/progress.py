"""The progress display: a bar while pages move, and a line for each round that ended."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from pageferry.cli.status import eta_in_words
from pageferry.cli.stdio import is_watched
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.units import format_duration, format_size
from pageferry.engine.job import JobStatus

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
            disable=not is_watched(console),
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
            self._show_postcopy(event)
        elif kind == "Notice":
            self._console.print(event["text"], markup=False, highlight=False, soft_wrap=True)
        elif kind == "Warned":
            self._console.print(f"warning: {event['text']}", markup=False, highlight=False, soft_wrap=True)
        elif kind == "Status":
            self._hold(event["status"] == JobStatus.HELD)
        elif kind == "RoundEnded":
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            if not self._held:
                self._console.print(_round_line(event["stats"], event["decision"]), highlight=False, soft_wrap=True)

    def _show_postcopy(self, event: Json) -> None:
        if self._task is None:
            self._task = self._bar.add_task("post-copy", total=event["missing_pages"] * PAGE_SIZE, eta="")
        eta = eta_in_words(event["eta_s"], event["eta_reason"])
        self._bar.update(self._task, completed=event["sent_pages"] * PAGE_SIZE, eta=eta)

    def _hold(self, held: bool) -> None:
        if held and not self._held:
            self._console.print("held; `pageferry switch` lets it go on", highlight=False, soft_wrap=True)
        self._held = held


class ReadingView:
    """A bar for pages that are read from a file; a context manager.

    Args:
        console: where to draw (standard error).
    """

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TransferSpeedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not is_watched(console))
        self._task = self._bar.add_task("reading", total=None)

    def __enter__(self) -> "ReadingView":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done_pages: int, pages: int) -> None:
        """Show how far it is."""
        self._bar.update(self._task, completed=done_pages * PAGE_SIZE, total=pages * PAGE_SIZE)


def _round_line(stats: Json, decision: Json | None) -> str:
    label = "stop-and-copy" if stats["final"] else f"round {stats['index']:<2}"
    rate = f"{format_size(stats['sent_bytes'] / stats['duration_s'])}/s" if stats["duration_s"] else "-"
    line = (
        f"{label:<14}{stats['sent_pages']:>9,} pages {format_size(stats['sent_bytes']):>10} "
        f"in {format_duration(stats['duration_s']):>9}  {rate:>13}"
    )
    if decision is not None:
        line += f"  {stats['remaining_pages']:>7,} dirty → {decision['action']}: {decision['reason']}"
    return line
