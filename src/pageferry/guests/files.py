"""Reads the files of a guest whole, up to a limit."""

from os import PathLike
from pathlib import Path

from pageferry.core.errors import UsageError
from pageferry.core.os_hints import file_hint
from pageferry.core.units import format_size

#: More than any kernel or program has.
MAX_FILE_BYTES = 256 << 20


def read_file(path: str | PathLike[str], *, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return a file's content.

    Raises:
        UsageError: it cannot be read, or has more than ``limit_bytes``.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=file_hint(error)) from error
    if len(data) > limit_bytes:
        raise UsageError(f"{path} is larger than {format_size(limit_bytes)}", hint="is it the right file?")
    return data
