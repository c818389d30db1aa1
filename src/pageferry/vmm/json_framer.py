"""Finding where one JSON value of a byte stream ends.

QMP clients need not end a command with a newline, and QEMU's own client for Python does not.
"""

import re

_MAX_VALUE_BYTES = 1 << 20
#: Half of what Python's own parser and writer of JSON bear.
MAX_DEPTH = 512
_SPACE = b" \t\r\n"
_IN_STRING, _OUTSIDE = re.compile(rb'["\\]'), re.compile(rb'["{}\[\]]')


class JsonFramer:
    """Cuts a byte stream into its top-level objects and arrays, by brackets and strings alone; sans-I/O.

    What begins with anything else is cut at the next newline, so that garbage costs one error, not the connection.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._depth = self._deepest = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> list[bytes | None]:
        """Take more of the stream; return the values that are complete now, in order.

        None stands for one that is nested more than 512 deep.

        Raises:
            ValueError: a value is longer than 1 MiB.
        """
        self._buffer += data
        values: list[bytes | None] = []
        while (end := self._end()) is not None:
            values.append(self._cut(end))
        if len(self._buffer) > _MAX_VALUE_BYTES:
            raise ValueError(f"a message is longer than {_MAX_VALUE_BYTES} bytes")
        return values

    def _end(self) -> int | None:
        """Return where the first value ends, if it is whole."""
        if self._at == 0:
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(_SPACE))]
            if not self._buffer:
                return None
            if self._buffer[0] not in b"{[":
                end = self._buffer.find(b"\n")
                return None if end < 0 else end
        while self._at < len(self._buffer):
            if self._escaped:
                self._escaped = False
                self._at += 1
            elif self._step():
                return self._at
        return None

    def _step(self) -> bool:
        """Go to behind the next byte that has a meaning; return whether the value ends there."""
        found = (_IN_STRING if self._in_string else _OUTSIDE).search(self._buffer, self._at)
        self._at = len(self._buffer) if found is None else found.end()
        if found is None:
            return False
        byte = found[0]
        if byte == b"\\":
            self._escaped = True
        elif byte == b'"':
            self._in_string = not self._in_string
        elif byte in b"{[":
            self._depth += 1
            self._deepest = max(self._deepest, self._depth)
        else:
            self._depth -= 1
            return self._depth == 0
        return False

    def _cut(self, end: int) -> bytes | None:
        value = bytes(self._buffer[:end]) if self._deepest <= MAX_DEPTH else None
        del self._buffer[:end]
        self._at = self._deepest = 0
        return value
