"""File names that mean the same in every process."""

from pathlib import Path

from pageferry.core.errors import UsageError


def absolute(path: str | Path) -> Path:
    """Return a path that does not depend on the current folder.

    Raises:
        UsageError: it does, and that folder was removed.
    """
    try:
        return Path(path).absolute()
    except FileNotFoundError as error:
        raise UsageError("the current folder was removed", hint="cd to another, or name files from / on") from error
