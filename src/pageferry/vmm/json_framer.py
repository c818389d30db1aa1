"""Finding where one JSON value of a byte stream ends.

QMP clients need not end a command with a newline, and QEMU's own client for Python does not.
"""

_MAX_VALUE_BYTES = 1 << 20
_SPACE = b" \t\r\n"


class JsonFramer:
    """Cuts a byte stream into its top-level objects and arrays, by brackets and strings alone; sans-I/O.

    What begins with anything else is cut at the next newline, so that garbage costs one error, not the connection.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take more of the stream; return the values that are complete now, in order.

        Raises:
            ValueError: a value is longer than 1 MiB.
        """
        self._buffer += data
        values = []
        while (value := self._next()) is not None:
            values.append(value)
        if len(self._buffer) > _MAX_VALUE_BYTES:
            raise ValueError(f"a message is longer than {_MAX_VALUE_BYTES} bytes")
        return values

    def _next(self) -> bytes | None:
        if self._at == 0:
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(_SPACE))]
            if not self._buffer:
                return None
            if self._buffer[0] not in b"{[":
                end = self._buffer.find(b"\n")
                return None if end < 0 else self._cut(end)
        while self._at < len(self._buffer):
            byte = self._buffer[self._at]
            self._at += 1
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == ord("\\"):
                    self._escaped = True
                elif byte == ord('"'):
                    self._in_string = False
            elif byte == ord('"'):
                self._in_string = True
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    return self._cut(self._at)
        return None

    def _cut(self, end: int) -> bytes:
        value = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._at = 0
        return value
