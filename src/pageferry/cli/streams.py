"""Streams from a file or standard input, packed or not, walked with errors that say what is wrong where."""

import gzip
import io
import lzma
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from pageferry.cli.stdio import is_watched, standard_input
from pageferry.core.errors import RemoteStreamError, UsageError
from pageferry.core.os_hints import file_hint
from pageferry.stream.walk import OnPages, Read, RecordSeen, Walk

Json = dict[str, Any]

_XZ, _GZIP = b"\xfd7zXZ\x00", b"\x1f\x8b"
_SILENT_S = 1.0
STANDARD_INPUT = "-"


class WrongStreamError(RemoteStreamError):
    """A stream is wrong in record number ``index``; None: before the first."""

    def __init__(self, name: str, error: RemoteStreamError, index: int | None) -> None:
        where = "" if index is None else f"record {index}: "
        what = "standard input" if name == STANDARD_INPUT else name
        super().__init__(f"{what}: {where}{error.reason}", record=error.record, offset=error.offset, hint=error.hint)
        self.index = index
        self._why = error.reason

    def to_json(self) -> Json:
        """Return what is wrong, and where, as JSON-ready values."""
        return {"index": self.index, "record": self.record, "offset": self.offset, "reason": self._why}


@contextmanager
def opened(name: str, console: Console) -> Iterator[Read]:
    """Open a stream for reading; a bar tells how far it is when that takes more than a second.

    Args:
        name: a file's, or ``-`` for standard input; packed by xz or gzip, or not at all.
        console: where to draw (standard error).

    Raises:
        UsageError: it cannot be opened, or (from the reader) read.
    """
    try:
        raw = os.fdopen(os.dup(standard_input("inspect -")), "rb") if name == STANDARD_INPUT else open(name, "rb")  # noqa: SIM115
        size_bytes = os.fstat(raw.fileno()).st_size
        unpacked = _unpacked(raw)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", hint=file_hint(error)) from error
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn())
    with raw, Progress(*columns, console=console, transient=True, disable=not is_watched(console)) as bar:
        task = bar.add_task("reading", total=size_bytes or None, visible=False)
        shown_from_s = time.monotonic() + _SILENT_S

        def read(buffer: memoryview) -> int:
            try:
                got = unpacked.readinto(buffer)
            except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
                raise RemoteStreamError("the data that it is packed in is damaged or cut") from error
            except OSError as error:
                raise UsageError(f"cannot read {name}: {error.strerror}", hint=file_hint(error)) from error
            if time.monotonic() > shown_from_s:
                bar.update(task, visible=True, completed=raw.tell() if raw.seekable() else None, advance=got)
            return got

        yield read


def followed(name: str, read: Read) -> bool:
    """Tell whether anything follows a stream that was walked to its END; one byte of it is read.

    Raises:
        WrongStreamError: what it is packed in is damaged.
    """
    try:
        return bool(read(memoryview(bytearray(1))))
    except RemoteStreamError as error:
        raise WrongStreamError(name, error, None) from error


def _unpacked(raw: io.BufferedReader) -> io.BufferedIOBase:
    head = raw.peek(len(_XZ))
    if head.startswith(_XZ):
        return lzma.open(raw)
    return gzip.open(raw) if head.startswith(_GZIP) else raw


def walked(name: str, read: Read, on_pages: OnPages | None = None) -> Iterator[RecordSeen]:
    """Yield what a stream consists of.

    Args:
        name: what to call it in errors.
        read: where its bytes come from.
        on_pages: sees page data.

    Raises:
        WrongStreamError: it is wrong from there on.
    """
    walk = Walk(read, on_pages)
    try:
        yield from walk
    except RemoteStreamError as error:
        raise WrongStreamError(name, error, walk.index if walk.offset else None) from error
