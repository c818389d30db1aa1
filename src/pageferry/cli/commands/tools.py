"""The commands that need no guest: ``inspect``, ``keys`` and ``doctor``."""

from pathlib import Path
from typing import Annotated

import typer

from pageferry.cli.control_options import JsonOption, path_argument
from pageferry.cli.inspect import compared, print_differences, print_json, print_table, print_verdict
from pageferry.cli.outcome import ExitCode
from pageferry.cli.stdio import ERR, OUT, print_object
from pageferry.cli.streams import STANDARD_INPUT, opened
from pageferry.core.errors import UsageError
from pageferry.engine.wire.lab_keys import make_keys
from pageferry.vmm.doctor import examine


def inspect(
    file: Annotated[str, typer.Argument(help="A stream, also packed by xz or gzip; - is standard input.")],
    diff: Annotated[str | None, typer.Option(help="Compare with this stream: tell what differs.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check it: no table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show, check or compare libxc migration streams, Xen's own included; name record and byte of what is wrong."""
    if diff is not None:
        if check or file == diff == STANDARD_INPUT:
            raise UsageError("--diff compares two streams", hint="it checks both; only one can be standard input")
        found = compared(file, diff, ERR)
        print_object(found) if as_json else print_differences(found, file, diff, OUT)
        raise typer.Exit(ExitCode.DONE if found["same"] else ExitCode.DIFFERENT)
    with opened(file, ERR) as read:
        if as_json:
            print_json(file, read, records=not check)
        elif check:
            print_verdict(file, read, OUT)
        else:
            print_table(file, read, OUT)


def keys(
    directory: Annotated[Path, path_argument(help="A new directory, for those of each end and of the CA.")],
    source: Annotated[str, typer.Option(help="Name or address of the source, for its certificate.")] = "source",
    destination: Annotated[
        str, typer.Option(help="Name or address of the destination: what `migrate tls://` connects to.")
    ] = "destination",
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long they are valid.")] = 30,
) -> None:
    """Make a small CA and the certificates of two hosts, for a lab: each end's --tls-dir, ready to copy."""
    made = make_keys(directory, source=source, destination=destination, days=days)
    for end, path in made.items():
        OUT.print(f"{end}: {path}", markup=False, soft_wrap=True)


def doctor(as_json: JsonOption = False) -> None:
    """Find out, by doing it, what this host can do, and what to do about what is missing."""
    findings = examine()
    if as_json:
        print_object({finding.capability: finding.to_json() for finding in findings})
        return
    told: dict[str, str] = {}
    for finding in findings:
        mark = "[green]yes[/]" if finding.works else "[yellow]no [/]"
        OUT.print(f"{mark} {finding.capability:<22}", end="")
        OUT.print(finding.detail, markup=False, soft_wrap=True)
        if finding.advice:
            before = told.setdefault(finding.advice, finding.capability)
            advice = finding.advice if before == finding.capability else f"as for {before}"
            OUT.print(f"    {'':<22}→ {advice}", markup=False, soft_wrap=True)
