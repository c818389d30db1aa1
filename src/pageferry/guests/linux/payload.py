"""Unpacks the kernel inside a bzImage, which may be packed in several ways; the size is bounded.

Source: the kernel's ``Documentation/arch/x86/boot.rst``, field ``payload_offset``; LZ4's "legacy frame" in the
``lz4_Frame_format.md`` of that project.
"""

import bz2
import contextlib
import lzma
import mmap
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

_XZ_MEMORY_BYTES = 256 << 20
_ZSTD_WINDOW_BYTES = 128 << 20
_LZ4_BLOCK_BYTES = 8 << 20


class PayloadError(Exception):
    """The payload is damaged; the message says how."""


def unpack(payload: memoryview, *, limit_bytes: int) -> bytes | memoryview | None:
    """Return what a payload holds; None if it is packed in a way that cannot be unpacked here.

    gzip, bzip2, xz and lzma always can, LZ4 and zstd where the ``compress`` extra is installed.

    Args:
        payload: packed, and after that its unpacked size (u32), as the kernel's build appends it.
        limit_bytes: how much is unpacked at the most, whatever the payload says of itself.

    Raises:
        PayloadError: it is damaged, or larger than ``limit_bytes``.
    """
    if bytes(payload[:4]) == b"\x7fELF":
        return payload
    unpacker = next((unpacker for magic, unpacker in _UNPACKERS if bytes(payload[: len(magic)]) == magic), None)
    if unpacker is None:
        return None
    announced_bytes = int.from_bytes(payload[-4:], "little")
    if announced_bytes > limit_bytes:
        raise PayloadError(f"it says that it has {announced_bytes:,} bytes, more than any kernel")
    try:
        unpacked = unpacker(payload, announced_bytes)
    except ImportError:
        return None
    if len(unpacked) != announced_bytes:
        raise PayloadError(f"{len(unpacked):,} bytes or more came out, and {announced_bytes:,} should have")
    return unpacked


# Each returns what it can unpack, a little more than ``size_bytes`` at the most.


def _gzip(payload: memoryview, size_bytes: int) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(payload, size_bytes + 1)
    except zlib.error as error:
        raise PayloadError("gzip cannot unpack it") from error


def _bzip2(payload: memoryview, size_bytes: int) -> bytes:
    try:
        return bz2.BZ2Decompressor().decompress(payload, size_bytes + 1)
    except OSError as error:
        raise PayloadError("bzip2 cannot unpack it") from error


def _xz(payload: memoryview, size_bytes: int) -> bytes:
    try:
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES).decompress(payload, size_bytes + 1)
    except lzma.LZMAError as error:
        raise PayloadError("xz cannot unpack it") from error


def _lz4(payload: memoryview, size_bytes: int) -> memoryview:
    block: Any = import_module("lz4.block")
    # Huge pages, filled block by block: most of what this takes is else the first touch of memory.
    unpacked = mmap.mmap(-1, size_bytes + _LZ4_BLOCK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        unpacked.madvise(mmap.MADV_HUGEPAGE)
    at, end = 4, len(payload) - 4
    while at < end and unpacked.tell() <= size_bytes:
        packed_bytes = int.from_bytes(payload[at : at + 4], "little")
        at += 4
        try:
            unpacked.write(block.decompress(payload[at : at + packed_bytes], uncompressed_size=_LZ4_BLOCK_BYTES))
        except block.LZ4BlockError as error:
            raise PayloadError("LZ4 cannot unpack it") from error
        at += packed_bytes
    return memoryview(unpacked)[: unpacked.tell()]


def _zstd(payload: memoryview, size_bytes: int) -> bytes:
    zstandard: Any = import_module("zstandard")
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).stream_reader(payload)
        unpacked: bytes = reader.read(size_bytes + 1)
    except zstandard.ZstdError as error:
        raise PayloadError("zstd cannot unpack it") from error
    return unpacked


_UNPACKERS: tuple[tuple[bytes, Callable[[memoryview, int], bytes | memoryview]], ...] = (
    (b"\x1f\x8b", _gzip),
    (b"BZh", _bzip2),
    (b"\xfd7zXZ\0", _xz),
    (b"\x5d\0\0", _xz),
    (b"\x02\x21\x4c\x18", _lz4),
    (b"\x28\xb5\x2f\xfd", _zstd),
)
