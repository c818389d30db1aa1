"""The commands of a dom0 of Xen: its domains, what a domain writes, and one whose migration ended without an answer."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from pageferry.cli.control_options import JsonOption
from pageferry.cli.dom0 import dom0
from pageferry.cli.signals import SIGNALS, Requests
from pageferry.cli.stdio import OUT, print_object, tell
from pageferry.core.errors import LogDirtyError, UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.units import format_size
from pageferry.xen.domain import XenDomain, expect_trackable, find_domain, read_configuration
from pageferry.xen.domains import DomainSeen, list_domains
from pageferry.xen.undo_log import take_back

_BAR_WIDTH = 40
_ROUNDS = 10


def group() -> typer.Typer:
    """In a dom0 of Xen: list its domains, watch what one of them writes."""
    app = typer.Typer(rich_markup_mode=None)
    app.command("list")(list_)
    app.command("log-dirty")(log_dirty)
    app.command("resume")(resume)
    return app


def list_(
    dirty_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Watch for so many seconds how much each domain writes.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the domains: paging, memory, whether log-dirty is on, and by whom, what they write if that is asked."""
    took_s = 0.0

    def watch() -> None:
        nonlocal took_s
        began_s = time.monotonic()
        requests.wait(dirty_rate or 0)
        took_s = time.monotonic() - began_s

    with dom0() as (control, store), SIGNALS.noted() as requests:
        domains = list_domains(control, store, watch=None if dirty_rate is None else watch)
    if as_json:
        print_object({"domains": [asdict(domain) | {"watched_s": took_s or None} for domain in domains]})
        return
    names = ["id", "name", "type", "paging", "state", "vCPUs", "memory", "log-dirty", *(["writes"] if took_s else [])]
    rows = [names]
    for domain in domains:
        row = [str(domain.domid), domain.name, domain.kind, domain.paging, domain.status, str(domain.vcpus)]
        row += [format_size(domain.memory_bytes), _log_dirty_in_words(domain)]
        if took_s:
            pages = domain.dirty_pages
            row.append("-" if pages is None else f"{format_size(int(pages * PAGE_SIZE / took_s))}/s")
        rows.append(row)
    _print_rows(rows)


def _print_rows(rows: list[list[str]]) -> None:
    """Print a table of one line for each row, also where it is wider than the terminal, or goes to a file."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        OUT.print(line, markup=False, highlight=False, soft_wrap=True)


def _log_dirty_in_words(domain: DomainSeen) -> str:
    if domain.log_dirty is None:
        return domain.by or "-"
    if not domain.log_dirty:
        return "off"
    return f"on, by {domain.by}" if domain.by else "on"


def log_dirty(
    domain: Annotated[str, typer.Argument(help="Name or number of the domain.")],
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds to watch.")] = _ROUNDS,
    interval: Annotated[float, typer.Option(min=0.001, help="Seconds from one CLEAN to the next.")] = 1.0,
    plot: Annotated[bool, typer.Option("--plot", help="Draw each round as a bar.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Watch what a running domain writes: ENABLE, a CLEAN each round, OFF. Ctrl-C ends it, and log-dirty is off."""
    with dom0() as (control, store):
        info = find_domain(control, store, domain)
        expect_trackable(info, read_configuration(info))
        seen: list[dict[str, Any]] = []
        guest = XenDomain(control, store, info)
        try:
            with SIGNALS.noted() as requests:
                for each in _watch(guest, rounds, interval, requests):
                    seen.append(each)
                    if not as_json:
                        _print_round(each, guest.memory.pages, drawn=plot)
        finally:
            guest.close()
    if as_json:
        print_object({"domain": info.domid, "memory_bytes": info.memory_pages * PAGE_SIZE, "rounds": seen})


def resume(domain: Annotated[str, typer.Argument(help="Name or number of the domain.")]) -> None:
    """Let a domain go on here whose migration ended without an answer. It must not run on the other host."""
    with dom0() as (control, store):
        info = find_domain(control, store, domain)
        take_back(control, info)
    tell(f"domain {info.domid} goes on here")


def _watch(guest: XenDomain, rounds: int, interval_s: float, requests: Requests) -> Iterator[dict[str, Any]]:
    """Yield one record for each round; ends early on a signal."""
    try:
        guest.log_dirty.enable()
    except LogDirtyError as error:
        raise UsageError(str(error), hint=error.hint) from error
    began_s = time.monotonic()
    for index in range(rounds):
        if requests.wait(interval_s):
            return
        asked_s = time.monotonic()
        dirty = guest.log_dirty.clean()
        now_s = time.monotonic()
        pages = dirty.count()
        yield {
            "index": index,
            "duration_s": asked_s - began_s,
            "clean_s": now_s - asked_s,
            "dirty_pages": pages,
            "dirty_bytes_per_s": pages * PAGE_SIZE / (asked_s - began_s),
        }
        began_s = now_s


def _print_round(each: dict[str, Any], memory_pages: int, *, drawn: bool) -> None:
    rate = format_size(int(each["dirty_bytes_per_s"]))
    line = (
        f"round {each['index']:>3}  {each['dirty_pages']:>9,} pages  {rate:>9}/s  clean {each['clean_s'] * 1e3:.2f} ms"
    )
    if drawn:
        line += "  " + "█" * round(_BAR_WIDTH * min(1.0, each["dirty_pages"] / max(1, memory_pages)))
    OUT.print(line, markup=False, highlight=False, soft_wrap=True)
