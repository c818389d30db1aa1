"""Options of the commands that need only a control socket; imports little."""

from pathlib import Path
from typing import Annotated, Any

import typer


def path_option(*names: str, help: str) -> Any:  # noqa: ANN401  # as typer.Option
    """Return an option that takes a path; who uses it finds out whether it can be read, and tells what to do if not."""
    return typer.Option(*names, help=help, readable=False)


def path_argument(*, help: str) -> Any:  # noqa: ANN401  # as typer.Argument
    """Return an argument that takes a path, as :func:`path_option` does."""
    return typer.Argument(help=help, readable=False)


ControlOption = Annotated[Path, path_option(help="The guest process's control socket.")]
OwnControlOption = Annotated[Path | None, path_option(help="Make a control socket here (QMP).")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on stderr.")
]
