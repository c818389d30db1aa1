"""A picture of a migration, drawn from its report: a self-contained HTML page.

Rounds over time, dirty against sent rate, the downtime's parts, and which pages were sent how often.
"""

from pathlib import Path
from typing import Any

from pageferry.cli.plot.html import page
from pageferry.cli.plot.picture import picture
from pageferry.core.errors import UsageError
from pageferry.core.os_hints import file_hint

_SUFFIX = ".html"


class PlotFile:
    """A file for a picture, refused at once if it cannot be: before a migration begins, not after it.

    A context manager; a file that it made and that stayed empty is gone afterwards.

    Args:
        path: where to.

    Raises:
        UsageError: its name does not end in ``.html``, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() != _SUFFIX:
            raise UsageError(f"no picture can be made in {path.name!r}", hint=f"a name that ends in {_SUFFIX}")
        self._ours = not path.exists()
        try:
            path.open("ab").close()
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}", hint=file_hint(error)) from error

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
        self.path.write_bytes(page(picture(report)))
        self._ours = False
