"""The ``pageferry`` command. What its exit codes mean: :class:`pageferry.cli.outcome.ExitCode`."""

import importlib
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any

import typer

from pageferry.cli import outcome
from pageferry.cli.signals import SIGNALS
from pageferry.cli.stdio import STREAMS
from pageferry.core.version import __version__

# Which click this is, typer's own or the package, depends on typer's version; BadParameter -> UsageError -> this.
_BadOption: Any = typer.BadParameter.__mro__[2]
#: What each command is, in a module of ``cli/commands``, and the first line of its help, in the order of ``--help``.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "migrations:demo",
        "Migrate a running guest between two processes on this host, and show what happened.",
    ),
    "run": (
        "processes:run_guest",
        "Run a guest; its console is standard output. Ctrl-C ends it. Ends with the guest's own exit code.",
    ),
    "receive": (
        "processes:receive",
        "Wait for a guest to be migrated here, then run it. A failed attempt leaves it waiting for the next.",
    ),
    "migrate": (
        "migrations:migrate_guest",
        "Migrate a guest live; Ctrl-C cancels and leaves it running where it is, until the handoff has begun.",
    ),
    "switch": ("migrations:switch", "Let a migration that was told to hold pause its guest and finish."),
    "cancel": ("migrations:cancel", "Cancel the migration under way; the guest stays where it is."),
    "limits": ("migrations:limits", "Change the limits of the migration under way, and of those to come."),
    "save": (
        "migrations:save",
        "Save a guest to a file while it runs, and prove that the file holds it; Ctrl-C cancels.",
    ),
    "restore": ("processes:restore", "Run a guest from a file, from where it was saved. The file stays as it is."),
    "inspect": (
        "tools:inspect",
        "Show, check or compare libxc migration streams, Xen's own included; name record and byte of what is wrong.",
    ),
    "status": ("control:status", "Tell what a guest process is doing."),
    "console": (
        "control:console",
        "Attach to a guest's console: its recent output, then live; what you type goes to it. Ctrl-] detaches.",
    ),
    "pause": ("control:pause", "Pause a guest."),
    "resume": ("control:resume", "Let a paused guest run on."),
    "shutdown": ("control:shut_down", "Ask a guest's operating system to shut down, as by its power button."),
    "quit": ("control:quit_guest", "End a guest process, and the guest with it."),
    "xen": ("xen:group", "In a dom0 of Xen: list its domains, watch what one of them writes."),
    "keys": (
        "tools:keys",
        "Make a small CA and the certificates of two hosts, for a lab: each end's --tls-dir, ready to copy.",
    ),
    "doctor": (
        "tools:doctor",
        "Find out, by doing it, what this host can do, and what to do about what is missing.",
    ),
}


#: These only tell something: they fail where standard output cannot be written.
_TELL = {"inspect", "status", "doctor", "xen"}
#: These have commands of their own.
_GROUPS = {"xen"}


def app_with(loaded: Collection[str]) -> typer.Typer:
    """Return the command line; of its commands these are loaded, of the others it knows name and first line only."""
    app = typer.Typer(
        name="pageferry",
        help="Move running virtual machines between processes and hosts, and prove that nothing was lost.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_main)
    for name, (where, help_line) in COMMANDS.items():
        if name in loaded and name in _GROUPS:
            app.add_typer(load_group(where), name=name, help=help_line)
        elif name in loaded:
            app.command(name)(load(where))
        else:
            app.command(name, help=help_line)(_not_named)
    return app


def _named(arguments: Sequence[str]) -> str:
    """Return the command that these arguments name, perhaps; the options before it have no values."""
    return next((argument for argument in arguments if not argument.startswith("-")), "")


def load(where: str) -> Callable[..., None]:
    """Return the command that ``module:function`` names."""
    module, _, function = where.partition(":")
    command: Callable[..., None] = getattr(importlib.import_module(f"pageferry.cli.commands.{module}"), function)
    return command


def load_group(where: str) -> typer.Typer:
    """Return the commands that are grouped under a name, which ``module:function`` makes."""
    module, _, function = where.partition(":")
    group: typer.Typer = getattr(importlib.import_module(f"pageferry.cli.commands.{module}"), function)()
    return group


def _not_named() -> None:
    raise AssertionError("a command ran that was not loaded")


def run() -> None:
    """Run the command that the arguments of the process name, and end the process with its exit code."""
    SIGNALS.outlive()
    outcome.run(lambda: app_with([_named(sys.argv[1:])])(standalone_mode=False), refusal=_BadOption)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pageferry {__version__}")
        raise typer.Exit


def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    if context.invoked_subcommand not in (None, *_TELL):
        STREAMS.make_results_a_courtesy()
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(outcome.ExitCode.USAGE)
