"""``pageferry status`` in words: what a guest process does, and what its tracker's witness found."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pageferry.core.command_hints import RECOVER
from pageferry.core.page_size import PAGE_SIZE
from pageferry.core.silence import SILENT_S
from pageferry.core.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import Console

Json = dict[str, Any]

#: What a person is told instead of QMP's word.
_DOING = {
    "inmigrate": "waiting for a guest",
    "finish-migrate": "paused for the stop-and-copy",
    "postmigrate": "the guest is not here any more; it ran",
    "shutdown": "shut down",
    "guest-panicked": "crashed",
    "io-error": "paused, since a page cannot be read from its file,",
}


def print_status(state: Json, say: Callable[[str], None]) -> None:
    """Print some lines about a guest process.

    Args:
        state: the answers to ``query-status`` and ``x-query-guest`` in one, and ``migration``: the answer to
            ``query-migrate``, None if no migration is under way.
        say: prints a line.
    """
    say(f"{state['name']}: {_doing(state)} on {state['accel']} ({state['accel_reason']})")
    if state["listening"]:
        say(_listening_line(state))
    if state["silent_s"] is not None:
        _say_receiving(state, say)
    if "memory_bytes" in state:
        _print_guest(state, say)
    if state["migration"] is not None:
        say(_outlook_line(state["migration"]))


def print_witness(state: Json, console: "Console") -> None:
    """Print one line about what the tracker and its witness compared, if it has one.

    Args:
        state: the answer to ``x-query-guest``, or a migration's report.
        console: where to print.
    """
    if state["oracle"] is not None:
        console.print(_witness_line(state["oracle"]), markup=False, soft_wrap=True)


def eta_in_words(eta_s: float | None, reason: str) -> str:
    """Return when it will be over, and the reason if that was moved back or is not known."""
    words = "no end in sight" if eta_s is None else f"over in {format_duration(eta_s)}"
    return f"{words} ({reason})" if reason else words


def _print_guest(state: Json, say: Callable[[str], None]) -> None:
    work = f", work done {', '.join(f'{each:,}' for each in state['work'])}" if state["work"] else ""
    memory = format_size(state["memory_bytes"])
    if state["huge_bytes"] is not None:
        memory += f" ({format_size(state['huge_bytes'])} in huge pages, {state['huge_pages']})"
    say(f"memory {memory}, tracker {state['tracker']}{work}")
    say(f"vCPUs {state['cpus']}, CPU {state['cpu']} ({state['cpu_name']})")
    if state["host_cpu"] is not None and not state["host_cpu"]["keeps_cpuid"]:
        from pageferry.core.host_cpu import HostCpu  # which is dear, and mostly there is nothing to say

        say(f"warning: {HostCpu(**state['host_cpu']).warning}")
    if state["unread_pages"]:
        say(f"{format_size(state['unread_pages'] * PAGE_SIZE)} still to be read from its file")
    if state["oracle"] is not None:
        say(_witness_line(state["oracle"]))
    if state["missing_pages"]:
        say(_missing_line(state))


def _doing(state: Json) -> str:
    # What the process does, in words; QMP's word where it has none.
    if state["status"] == "postmigrate" and state["guest_at"] == "unknown":
        return "not known whether the guest has left; it ran"
    word: str = state["status"]
    return _DOING.get(word, word)


def _listening_line(state: Json) -> str:
    if "memory_bytes" not in state:
        return f"waiting for a guest at {state['listening']}"
    if not state["unheard"]:
        return f"its source may come back to {state['listening']}"
    return f"its source has not heard yet that the guest is here; it may ask at {state['listening']}"


def _say_receiving(state: Json, say: Callable[[str], None]) -> None:
    parts = [] if state.get("missing_pages") else ["a guest is being received"]  # that guest is here, and has a line
    if state["silent_s"] >= SILENT_S:
        parts.append(f"nothing has come from its source for {state['silent_s']:.0f} s")
    if parts:
        say("; ".join(parts))


def _outlook_line(migration: Json) -> str:
    # A migration under way: the answer to query-migrate.
    ram = migration["ram"]
    words = [
        f"migration {migration['status']}: {format_size(ram['remaining'])} remain",
        f"{format_size(ram['mbps'] * 1e6 / 8)}/s sent",
        f"{format_size(ram['dirty-pages-rate'] * PAGE_SIZE)}/s dirtied",
    ]
    if "expected-downtime" in migration:
        words.append(f"a pause now would take {format_duration(migration['expected-downtime'] / 1e3)}")
    return ", ".join([*words, eta_in_words(migration["x-eta-s"], migration["x-eta-reason"])])


def _missing_line(guest: Json) -> str:
    # What it means that pages have not come yet.
    pages = f"{guest['missing_pages']:,} pages ({format_size(guest['missing_pages'] * PAGE_SIZE)})"
    if not guest["waits_for_source"]:
        return f"{pages} are still coming from its source; if that process ends before, the guest is lost"
    return (
        f"the guest stands still: the connection to its source was cut, and {pages} are only there. At the source: "
        f"{RECOVER}. If that process has ended, the guest is lost: end this process by a signal"
    )


def _witness_line(found: Json) -> str:
    rounds = f"{found['rounds']} round{'s' if found['rounds'] != 1 else ''}"
    return (
        f"oracle: {found['trackers']} agreed on {found['pages']:,} pages in {rounds}, "
        f"{found['spurious_primary']:,} + {found['spurious_witness']:,} reports of pages that had not changed"
    )
