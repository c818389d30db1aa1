"""``pageferry status`` in words: what a guest process does, and what its tracker's witness found."""

from typing import Any

from rich.console import Console

from pageferry.cli.progress import eta_in_words
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.host_cpu import HostCpu
from pageferry.core.units import format_size

Json = dict[str, Any]


def print_status(state: Json, console: Console) -> None:
    """Print some lines about a guest process.

    Args:
        state: the answers to ``query-status`` and ``x-query-guest`` in one, and ``migration``: the answer to
            ``query-migrate``, None if no migration is under way.
        console: where to print.
    """
    console.print(f"{state['name']}: {state['status']} on {state['accel']} ({state['accel_reason']})", markup=False)
    if state["listening"]:
        console.print(f"waiting for a guest at {state['listening']}", markup=False)
    if "memory_bytes" in state:
        _print_guest(state, console)
    if state["migration"] is not None:
        console.print(_outlook_line(state["migration"]), markup=False, soft_wrap=True)


def print_witness(state: Json, console: Console) -> None:
    """Print one line about what the tracker and its witness compared, if it has one.

    Args:
        state: the answer to ``x-query-guest``, or a migration's report.
        console: where to print.
    """
    if state["oracle"] is not None:
        console.print(_witness_line(state["oracle"]), markup=False, soft_wrap=True)


def _print_guest(state: Json, console: Console) -> None:
    work = ", ".join(f"{each:,}" for each in state["work"])
    memory = format_size(state["memory_bytes"])
    if state["huge_bytes"] is not None:
        memory += f" ({format_size(state['huge_bytes'])} in huge pages, {state['huge_pages']})"
    console.print(f"memory {memory}, tracker {state['tracker']}, work done {work}")
    console.print(f"vCPUs {state['cpus']}, CPU {state['cpu']} ({state['cpu_name']})", markup=False)
    if state["host_cpu"] is not None and (warning := HostCpu(**state["host_cpu"]).warning) is not None:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    if state["unread_pages"]:
        console.print(f"{format_size(state['unread_pages'] * PAGE_SIZE)} still to be read from its file")
    print_witness(state, console)
    if state["missing_pages"]:
        console.print(_missing_line(state), markup=False, soft_wrap=True)


def _outlook_line(migration: Json) -> str:
    # A migration under way: the answer to query-migrate.
    ram = migration["ram"]
    words = [
        f"migration {migration['status']}: {format_size(ram['remaining'])} remain",
        f"{format_size(ram['mbps'] * 1e6 / 8)}/s sent",
        f"{format_size(ram['dirty-pages-rate'] * PAGE_SIZE)}/s dirtied",
    ]
    if "expected-downtime" in migration:
        words.append(f"a pause now would take {migration['expected-downtime']} ms")
    return ", ".join([*words, eta_in_words(migration["x-eta-s"], migration["x-eta-reason"])])


def _missing_line(guest: Json) -> str:
    # What it means that pages have not come yet.
    pages = f"{guest['missing_pages']:,} pages ({format_size(guest['missing_pages'] * PAGE_SIZE)})"
    if not guest["waits_for_source"]:
        return f"{pages} are still coming from its source; if that process ends before, the guest is lost"
    return (
        f"the guest stands still: the connection to its source was cut, and {pages} are only there. At the source: "
        "pageferry migrate --recover. If that process has ended, the guest is lost: end this one by pageferry quit"
    )


def _witness_line(found: Json) -> str:
    rounds = f"{found['rounds']} round{'s' if found['rounds'] != 1 else ''}"
    return (
        f"oracle: {found['trackers']} agreed on {found['pages']:,} pages in {rounds}, "
        f"{found['spurious_primary']:,} + {found['spurious_witness']:,} spurious reports"
    )
