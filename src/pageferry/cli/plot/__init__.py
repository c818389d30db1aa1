"""Pictures of a migration, drawn from its report: rounds over time, rates, the downtime's parts, which pages were sent.

``.svg`` and ``.png`` are drawn with matplotlib (the extra ``plot``); ``.html`` is a page that stands alone and needs
nothing.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from pageferry.cli.plot.html import page
from pageferry.cli.plot.picture import Picture, picture
from pageferry.core.errors import UnsupportedError, UsageError


def _figure(file_format: str) -> Callable[[Picture], bytes]:
    def draw(drawn: Picture) -> bytes:
        from pageferry.cli.plot.figure import figure  # matplotlib is an extra

        return figure(drawn, file_format)

    return draw


_DRAW: dict[str, Callable[[Picture], bytes]] = {
    ".svg": _figure("svg"),
    ".png": _figure("png"),
    ".html": page,
}


class PlotFile:
    """A file for a picture, refused at once if it cannot be: before a migration begins, not after it.

    A context manager; a file that it made and nobody drew into is gone afterwards.

    Args:
        path: where to; its ending says which format.

    Raises:
        UsageError: there is no such format, or the file cannot be written.
        UnsupportedError: the format needs matplotlib, and it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._draw = _DRAW.get(path.suffix.lower())
        if self._draw is None:
            raise UsageError(f"no picture can be made in {path.name!r}", hint=f"a name that ends in {', '.join(_DRAW)}")
        if self._draw is not page:
            _expect_matplotlib(path.suffix)
        self._ours = not path.exists()
        try:
            path.open("ab").close()
        except OSError as error:
            raise UsageError(
                f"cannot write {path}: {error.strerror}", hint="choose a file in a folder that you may write"
            ) from error

    def __enter__(self) -> "PlotFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self.path.unlink(missing_ok=True)

    def draw(self, report: dict[str, Any]) -> None:
        """Draw the picture of a report, as JSON-ready values.

        Raises:
            OSError: the file cannot be written any more.
        """
        if self._draw is not None:
            self.path.write_bytes(self._draw(picture(report)))
            self._ours = False


def _expect_matplotlib(suffix: str) -> None:
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise UnsupportedError(
            "plot",
            f"a {suffix} picture needs matplotlib, which cannot be imported ({error})",
            hint=f"{sys.executable} -m pip install 'matplotlib>=3.8'; a .html needs nothing",
        ) from error
