"""The ``pageferry`` command. What its exit codes mean: :class:`pageferry.cli.shell.ExitCode`."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pageferry.cli.client import Interrupted
from pageferry.cli.commands import control, migrations, processes, tools
from pageferry.cli.shell import ERR, ExitCode, complain, exit_code_of
from pageferry.core.errors import PageferryError
from pageferry.core.version import __version__

app = typer.Typer(
    name="pageferry",
    help="Move running virtual machines between processes and hosts, and prove that nothing was lost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Which click this is, typer's own or the package, depends on typer's version; BadParameter -> UsageError -> this.
_BadOption: Any = typer.BadParameter.__mro__[2]
#: By name, in the order of ``pageferry --help``.
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": migrations.demo,
    "run": processes.run_guest,
    "receive": processes.receive,
    "migrate": migrations.migrate_guest,
    "switch": migrations.switch,
    "cancel": migrations.cancel,
    "limits": migrations.limits,
    "save": migrations.save,
    "restore": processes.restore,
    "inspect": tools.inspect,
    "status": control.status,
    "console": control.console,
    "pause": control.pause,
    "resume": control.resume,
    "shutdown": control.shut_down,
    "quit": control.quit_guest,
    "keys": tools.keys,
    "doctor": tools.doctor,
}
for _name, _function in _COMMANDS.items():
    app.command(_name)(_function)


def run() -> None:
    """Run the command and end the process with its exit code; errors are one line and a hint, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except _BadOption as error:
        complain(error.format_message(), "pageferry --help tells more")
        code = ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort, Interrupted) as error:
        complain("cancelled; the guest runs on at the source" if isinstance(error, Interrupted) else "interrupted")
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.DEFECT
    except Exception as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        if isinstance(error, PageferryError):
            complain(str(error), error.hint)
        else:
            complain(f"internal error: {error!r}", "this is a defect: pageferry --debug ... shows where")
        code = exit_code_of(error)
    sys.exit(code if isinstance(code, int) else ExitCode.DONE)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pageferry {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    if context.invoked_subcommand is None:
        ERR.print(context.get_help(), markup=False, soft_wrap=True)
        raise typer.Exit(ExitCode.USAGE)
