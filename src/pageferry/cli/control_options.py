"""Options of the commands that need only a control socket; imports little."""

from pathlib import Path
from typing import Annotated

import typer

ControlOption = Annotated[Path, typer.Option(help="The guest process's control socket.")]
OwnControlOption = Annotated[Path | None, typer.Option(help="Make a control socket here (QMP).")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on stderr.")
]
