"""The commands that ask or tell a guest process something, over its control socket."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pageferry.cli.control_options import ControlOption, JsonOption
from pageferry.cli.printable import printable
from pageferry.cli.status import print_status
from pageferry.cli.stdio import print_object, standard_input, standard_output, tell
from pageferry.vmm.qmp_client import QmpClient


def status(control: ControlOption, as_json: JsonOption = False) -> None:
    """Tell what a guest process is doing."""
    with QmpClient(control) as client:
        state = client.execute("query-status") | client.execute("x-query-guest")
        migration = client.execute("query-migrate")
    state.pop("singlestep", None)
    state["migration"] = migration if "x-eta-reason" in migration else None
    if as_json:
        print_object(state)
        return
    print_status(state, lambda line: print(printable(line)))


def console(control: ControlOption) -> None:
    """Attach to a guest's console: its recent output, then live; what you type goes to it. Ctrl-] detaches."""
    from pageferry.cli.console import ConsoleSession, raw_input  # which `status` does not need

    input_fd = standard_input()
    with QmpClient(control) as client, raw_input(input_fd):
        ConsoleSession(client, input_fd, standard_output("the guest's console"), tell).run()


def _command(control: Path, name: str, **arguments: Any) -> None:  # noqa: ANN401  # any JSON value
    with QmpClient(control) as client:
        client.execute(name, **arguments)


def pause(control: ControlOption) -> None:
    """Pause a guest."""
    _command(control, "stop")


def resume(
    control: ControlOption,
    force: Annotated[
        bool,
        typer.Option(
            help="Take back a guest that `save --stop` left here, or whose migration ended unknown, "
            "if it surely runs nowhere else."
        ),
    ] = False,
) -> None:
    """Let a paused guest run on."""
    _command(control, "cont", **({"x-force": True} if force else {}))


def shut_down(control: ControlOption) -> None:
    """Ask a guest's operating system to shut down, as by its power button."""
    _command(control, "system_powerdown")


def quit_guest(control: ControlOption) -> None:
    """End a guest process, and the guest with it."""
    _command(control, "quit")
