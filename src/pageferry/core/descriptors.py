"""Writing to a descriptor that another program opened: a pipe, a terminal or a file."""

import os
import select


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of it; a descriptor that does not block is waited for.

    Raises:
        OSError: it cannot be written; some of it may have been.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select([], [fd], [])
