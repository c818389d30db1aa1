"""The libxc stream inside what Xen's tools write around it: the libxl stream, and the file of ``xl save``.

::

    xl header, 32 + 16 bytes | optional data: the domain's configuration as JSON
      libxl header, 16 bytes | records: ... LIBXC_CONTEXT
        the libxc stream, to its END
      records: EMULATOR_XENSTORE_DATA, EMULATOR_CONTEXT, ... END

Source: Xen, ``docs/specs/libxl-migration-stream.pandoc``, version 2; ``xl save`` of Xen 4.17.
"""

import json
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct
from struct import error as StructError
from typing import Any

from pageferry.core.errors import RecordError, TruncatedError, VersionError
from pageferry.stream.foreign import LIBXL_MAGIC, XL_MAGIC
from pageferry.stream.format import padding_bytes
from pageferry.stream.walk import Read

_XL_HEADER = Struct("<IIII")  # behind the magic: byte order, mandatory flags, optional flags, optional data's length
_BYTE_ORDER = 0x0102_0304
_XL_JSON, _XL_STREAM_V2 = 1, 2
_MAX_OPTIONAL_BYTES = 16 << 20
_LENGTH = Struct("<I")
_LIBXL_HEADER = Struct(">II")  # behind the magic: version, options
_LIBXL_VERSION = 2
_LIBXL_BIG_ENDIAN = 1
_RECORD = Struct("<II")
_SCRATCH_BYTES = 1 << 16


class LibxlRecord(IntEnum):
    """Records of the libxl stream."""

    END = 0
    LIBXC_CONTEXT = 1
    EMULATOR_XENSTORE_DATA = 2
    EMULATOR_CONTEXT = 3
    CHECKPOINT_END = 4
    CHECKPOINT_STATE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What is around a libxc stream.

    ``kind`` is ``xl`` or ``libxl``. ``begins_at`` is the first byte of the libxc stream in the file. ``domain`` holds
    the ``name``, ``uuid`` and ``type`` of its configuration, as far as they are there.
    """

    kind: str
    begins_at: int
    domain: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {"kind": self.kind, "begins_at": self.begins_at, "domain": self.domain}


def xl_head(configuration: bytes) -> bytes:
    """Return what ``xl save`` writes before a libxc stream: xl header, configuration, libxl header, LIBXC_CONTEXT.

    Args:
        configuration: the domain's, as JSON.
    """
    optional = _LENGTH.pack(len(configuration)) + configuration
    header = XL_MAGIC + _XL_HEADER.pack(_BYTE_ORDER, _XL_JSON | _XL_STREAM_V2, 0, len(optional))
    return header + optional + libxl_head()


def libxl_head() -> bytes:
    """Return what a libxl stream has before its libxc stream."""
    return LIBXL_MAGIC + _LIBXL_HEADER.pack(_LIBXL_VERSION, 0) + _RECORD.pack(LibxlRecord.LIBXC_CONTEXT, 0)


def libxl_tail() -> bytes:
    """Return what a libxl stream has after its libxc stream, of a domain without a device model."""
    return _RECORD.pack(LibxlRecord.END, 0)


class Inside:
    """Reads the libxc stream of a file, whatever is around it; called as what it reads from.

    Args:
        read: where the bytes come from.

    ``envelope`` is known after the first call: None if the stream is bare, or not a stream.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._offset = 0
        self._unread = b""
        self._opened = False
        self.envelope: Envelope | None = None

    def _open(self) -> None:
        self._opened = True
        begin = self._up_to(len(XL_MAGIC))
        if begin == XL_MAGIC:
            domain = self._xl_header()
            if self._take(len(LIBXL_MAGIC), "libxl header") != LIBXL_MAGIC:
                raise RecordError("no libxl stream follows", record="libxl header", offset=self._offset - 8)
            self._to_libxc()
            self.envelope = Envelope(kind="xl", begins_at=self._offset, domain=domain)
        elif begin.startswith(LIBXL_MAGIC):
            self._unread = begin[len(LIBXL_MAGIC) :]
            self._offset = len(LIBXL_MAGIC)
            self._to_libxc()
            self.envelope = Envelope(kind="libxl", begins_at=self._offset)
        else:
            self._unread = begin

    def __call__(self, buffer: memoryview) -> int:
        """Fill some of a buffer.

        Raises:
            RemoteStreamError: what is around the stream is wrong, or of a kind that is not read.
        """
        if not self._opened:
            self._open()
        if not self._unread:
            got = self._read(buffer)
        else:
            got = min(len(buffer), len(self._unread))
            buffer[:got], self._unread = self._unread[:got], self._unread[got:]
        self._offset += got
        return got

    def finish(self) -> list[tuple[str, int]]:
        """Go on from the libxc stream's END to the end of what is around it; return its records: names and lengths.

        Raises:
            RemoteStreamError: it is wrong, or cut.
        """
        seen: list[tuple[str, int]] = []
        while self.envelope is not None:
            name, length_bytes = self._record()
            seen.append((name, length_bytes))
            if name == LibxlRecord.END.name:
                break
        return seen

    def _up_to(self, count: int) -> bytes:
        """Return the first bytes, fewer where the file ends; the offset stays what it is."""
        begin = bytearray(count)
        at = 0
        while at < count and (got := self._read(memoryview(begin)[at:])):
            at += got
        return bytes(begin[:at])

    def _take(self, count: int, what: str) -> bytes:
        taken = bytearray(count)
        at = 0
        while at < count:
            got = self(memoryview(taken)[at:])
            if not got:
                raise TruncatedError(f"the file stops after {self._offset} bytes", record=what)
            at += got
        return bytes(taken)

    def _xl_header(self) -> dict[str, str]:
        self._offset = len(XL_MAGIC)
        order, mandatory, _, length_bytes = _XL_HEADER.unpack(self._take(_XL_HEADER.size, "xl header"))
        if order != _BYTE_ORDER:
            raise VersionError("saved on a host of another byte order", record="xl header", offset=len(XL_MAGIC))
        if unknown := mandatory & ~(_XL_JSON | _XL_STREAM_V2):
            raise VersionError(f"needs what is not known: flags {unknown:#x}", record="xl header", offset=36)
        if not mandatory & _XL_STREAM_V2:
            raise VersionError("the stream in it is of Xen before 4.6", record="xl header", offset=36)
        if length_bytes > _MAX_OPTIONAL_BYTES:
            raise RecordError(f"a configuration of {length_bytes} bytes", record="xl header", offset=44)
        return _domain(self._take(length_bytes, "xl configuration"))

    def _to_libxc(self) -> None:
        at = self._offset - len(LIBXL_MAGIC)
        version, options = _LIBXL_HEADER.unpack(self._take(_LIBXL_HEADER.size, "libxl header"))
        if version != _LIBXL_VERSION:
            raise VersionError(f"libxl stream version {version} is not 2", record="libxl header", offset=at)
        if options & _LIBXL_BIG_ENDIAN:
            raise VersionError("a big-endian stream; only little-endian is read", record="libxl header", offset=at)
        while True:
            name, _ = self._record()
            if name == LibxlRecord.LIBXC_CONTEXT.name:
                return
            if name == LibxlRecord.END.name:
                raise RecordError("there is no libxc stream in it", record=f"libxl {name}", offset=self._offset - 8)

    def _record(self) -> tuple[str, int]:
        at = self._offset
        number, length_bytes = _RECORD.unpack(self._take(_RECORD.size, "libxl record header"))
        try:
            name = LibxlRecord(number).name
        except ValueError:
            raise RecordError("a libxl record of unknown type", record=f"type {number:#x}", offset=at) from None
        left = length_bytes + padding_bytes(length_bytes)
        if left and number in (LibxlRecord.END, LibxlRecord.LIBXC_CONTEXT):
            raise RecordError("it has a body", record=f"libxl {name}", offset=at)
        while left:
            left -= len(self._take(min(left, _SCRATCH_BYTES), f"libxl {name}"))
        return name, length_bytes


def _domain(optional: bytes) -> dict[str, str]:
    """Return what a person wants to know of a domain's configuration; nothing where it is not JSON as xl writes it."""
    try:
        (length_bytes,) = _LENGTH.unpack_from(optional)
        about = json.loads(optional[_LENGTH.size : _LENGTH.size + length_bytes].rstrip(b"\0"))["c_info"]
        return {key: str(about[key]) for key in ("name", "uuid", "type") if key in about}
    except (ValueError, KeyError, TypeError, RecursionError, StructError):
        return {}
