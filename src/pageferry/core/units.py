"""Sizes as people write them."""

import re

from pageferry.core.errors import UsageError

_SUFFIX = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Return ``text`` ("256M", "1GiB", "4096") in bytes; suffixes are powers of 1024.

    Raises:
        UsageError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    size_bytes = int(match[1]) * _SUFFIX[match[2]] if match else 0
    if size_bytes <= 0:
        raise UsageError(f"not a size: {text!r}", hint="write a number with K, M, G or T, for example 256M")
    return size_bytes


def parse_number(text: str) -> int:
    """Return ``text`` as :func:`parse_size` does, or 0 for "0": a size or any other number.

    Raises:
        UsageError: the text is neither.
    """
    return 0 if text.strip() == "0" else parse_size(text)


def parse_rate(text: str) -> int | None:
    """Return ``text`` ("100M", "1GiB/s") in bytes a second, None for "0", which means no limit.

    Raises:
        UsageError: the text is not a size.
    """
    size = text.strip().removesuffix("/s")
    return None if size == "0" else parse_size(size)


def format_size(size_bytes: float) -> str:
    """Return ``size_bytes`` for a person: the largest binary unit that keeps at least one whole digit."""
    for suffix, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.4g} {suffix}"
    return f"{size_bytes:.0f} B"


def format_count(count: int, noun: str) -> str:
    """Return "1 page", or "1,000 pages"; the noun is one whose plural only takes an s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(duration_s: float) -> str:
    """Return ``duration_s`` for a person, in s, ms or µs."""
    if duration_s >= 1:
        return f"{duration_s:.2f} s"
    if duration_s >= 1e-3:
        return f"{duration_s * 1e3:.1f} ms"
    return f"{duration_s * 1e6:.0f} µs"
