"""Packing: page data as lz4 or zstd make it smaller. Both libraries are optional.

They work without the interpreter lock. A packer belongs to one thread.
"""

import importlib
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, Protocol

from pageferry.core.errors import UnsupportedError
from pageferry.stream.format import BodyError

#: The fastest level that zstd calls its own.
_ZSTD_LEVEL = 1


class Packing(StrEnum):
    """How page data is packed."""

    NONE = "none"
    LZ4 = "lz4"
    ZSTD = "zstd"


class Packer(Protocol):
    """Packs and unpacks buffers."""

    def pack(self, data: memoryview) -> bytes:
        """Return ``data`` packed; it must not change meanwhile."""

    def unpack(self, packed: bytes, size_bytes: int) -> bytes:
        """Return what was packed; no more than ``size_bytes`` is allocated, whatever ``packed`` says.

        Raises:
            BodyError: these are not ``size_bytes``, packed.
        """


def packer(packing: Packing) -> Packer:
    """Return a packer.

    Args:
        packing: any but NONE.

    Raises:
        UnsupportedError: its library is not installed here.
    """
    module, make = _MAKERS[packing]
    try:
        return make(importlib.import_module(module))
    except ImportError as error:
        raise UnsupportedError(
            str(packing), f"--compress {packing} needs a library that is not installed here", hint=_HINT
        ) from error


def available(packings: Iterable[Packing] | None = None) -> tuple[Packing, ...]:
    """Return those whose library is installed here, which takes loading it; of all where None is given."""
    found = []
    for packing in _MAKERS if packings is None else packings:
        try:
            packer(packing)
        except UnsupportedError:
            continue
        found.append(packing)
    return tuple(found)


class _Lz4:
    # Source: LZ4 block format; the size of what was packed is the record's business.

    def __init__(self, module: Any) -> None:  # noqa: ANN401  # an optional library
        self._module = module

    def pack(self, data: memoryview) -> bytes:
        packed: bytes = self._module.compress(data, store_size=False)
        return packed

    def unpack(self, packed: bytes, size_bytes: int) -> bytes:
        try:
            data: bytes = self._module.decompress(packed, uncompressed_size=size_bytes)
        except self._module.LZ4BlockError as error:
            raise BodyError(f"{len(packed)} bytes are not {size_bytes}, packed by lz4") from error
        return _of_size(data, size_bytes, "lz4")


class _Zstd:
    # Source: RFC 8878; each batch is one frame that tells its content size.

    def __init__(self, module: Any) -> None:  # noqa: ANN401  # an optional library
        self._module = module
        self._compressor = module.ZstdCompressor(level=_ZSTD_LEVEL)
        self._decompressor = module.ZstdDecompressor()

    def pack(self, data: memoryview) -> bytes:
        packed: bytes = self._compressor.compress(data)
        return packed

    def unpack(self, packed: bytes, size_bytes: int) -> bytes:
        try:
            if self._module.frame_content_size(packed) != size_bytes:  # or else it would be allocated
                raise BodyError(f"the frame of {len(packed)} bytes does not say that it holds {size_bytes}")
            data: bytes = self._decompressor.decompress(packed, allow_extra_data=False)
        except self._module.ZstdError as error:
            raise BodyError(f"{len(packed)} bytes are not {size_bytes}, packed by zstd") from error
        return _of_size(data, size_bytes, "zstd")


def _of_size(data: bytes, size_bytes: int, name: str) -> bytes:
    if len(data) != size_bytes:
        raise BodyError(f"{len(data)} bytes came out of {name} where {size_bytes} were packed")
    return data


_MAKERS: dict[Packing, tuple[str, Callable[[Any], Packer]]] = {
    Packing.LZ4: ("lz4.block", _Lz4),
    Packing.ZSTD: ("zstandard", _Zstd),
}
_HINT = "pip install 'pageferry[compress]', on both hosts"
