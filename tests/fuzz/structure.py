"""Bytes as what they consist of, and changes of that: how a conversation, a file or a state becomes a wrong one.

:func:`cut` takes bytes apart into chunks: preamble, frames, records, entries of the machine's state, each with its
header and body. :meth:`Mutation.of` changes some of them. A chunk that was not told to lie says its true length, so
most changes are read as far as they are meant to be.
"""

import json
import random
import string
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pageferry.core.frames import PCI_HOLE_END, PCI_HOLE_START
from pageferry.stream.ferry import MAGIC
from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.format import OPTIONAL, RecordType
from pageferry.stream.hvm_context import DEVICE_HEAD
from pageferry.stream.hvm_entries import Typecode

_PREAMBLE_BYTES, _HEADERS_BYTES = 48, 40
_STREAM_BEGINS = b"\xff" * 8
_ENTRY = _DEVICE = (2, 2, 4)
_NUMBERS = sorted(
    {near for bits in (3, 7, 8, 12, 15, 16, 31, 32, 40, 52, 63, 64) for near in ((1 << bits) - 1, 1 << bits)}
    | {0, 1, 2, 511, 513, 1024, 1025, 16_384, 65_536}
    | {near >> shift for end in (PCI_HOLE_START, PCI_HOLE_END) for near in (end, end - 1) for shift in (0, 12)}
)
_VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 0.5, 1e308, "", "\0", "x" * 2000, "é", [], {}, [[]], *_NUMBERS)
_MOST_CHANGES = 5
_WAYS = (*["body"] * 6, *["field"] * 3, "lie", "drop", "repeat", "swap", "graft")


@dataclass
class Chunk:
    """A header of little-endian ``fields``, each of so many bytes as ``widths`` says, and a body: bytes, or chunks.

    ``length_at``: which field is the body's length; None: none is. ``align``: zeros follow the body up to a multiple.
    ``lie``: what is added to the length that is said.
    """

    name: str
    body: "bytes | list[Chunk]"
    widths: tuple[int, ...] = ()
    fields: list[int] = field(default_factory=list)
    length_at: int | None = None
    align: int = 1
    lie: int = 0

    def __bytes__(self) -> bytes:
        body = joined(self.body)
        fields = list(self.fields)
        if self.length_at is not None:
            fields[self.length_at] = len(body) + self.lie
        head = b"".join(
            (value % (1 << 8 * width)).to_bytes(width, "little")
            for value, width in zip(fields, self.widths, strict=True)
        )
        return head + body + bytes(-len(body) % self.align)


def joined(body: bytes | list[Chunk]) -> bytes:
    """Return what chunks are together."""
    return body if isinstance(body, bytes) else b"".join(map(bytes, body))


def cut(data: bytes) -> list[Chunk]:
    """Take bytes apart; what follows something that is not known is one chunk. ``joined`` gives the same bytes."""
    chunks, at = [], 0
    while at < len(data):
        chunk, size = _first(data[at:])
        chunks.append(chunk)
        at += size
    return chunks


def _first(data: bytes) -> tuple[Chunk, int]:
    for begin, name, size in ((MAGIC, "preamble", _PREAMBLE_BYTES), (_STREAM_BEGINS, "headers", _HEADERS_BYTES)):
        if data.startswith(begin):
            return Chunk(name, data[:size]), min(size, len(data))
    if len(data) >= 8:
        number, length = struct.unpack_from("<II", data)
        name, align = _name_of(number)
        end = 8 + length + -length % align
        if name and end <= len(data) and not any(data[8 + length : end]):
            body = _body(name, data[8 : 8 + length])
            return Chunk(name, body, (4, 4), [number, length], 1, align), end
    return Chunk("raw", data), len(data)


def _name_of(number: int) -> tuple[str, int]:
    for kind, known, align in ((FrameType, number, 1), (RecordType, number, 8), (RecordType, number & ~OPTIONAL, 8)):
        if known in kind.__members__.values():
            return kind(known).name, align
    return "", 1


def _body(name: str, data: bytes) -> bytes | list[Chunk]:
    if name == "HVM_CONTEXT":
        return entries_of(data)
    if name in ("PAGE_DATA", "ZERO_PAGES") and len(data) >= 8:
        count = struct.unpack_from("<I", data)[0]
        if 8 + 8 * count <= len(data):
            fields = struct.unpack_from(f"<II{count}Q", data)
            return [Chunk(f"{name} pages", data[8 + 8 * count :], (4, 4, *[8] * count), list(fields))]
    return data


def entries_of(context: bytes) -> list[Chunk]:
    """Take a machine's state apart into its entries."""
    chunks, at = [], 0
    while at + 8 <= len(context):
        code, instance, length = struct.unpack_from("<HHI", context, at)
        end = at + 8 + length
        if end > len(context):
            break
        body: bytes | list[Chunk] = context[at + 8 : end]
        if code == Typecode.DEVICE:
            body = [_device(context[at + 8 : end])]
        chunks.append(Chunk(f"entry {code}", body, _ENTRY, [code, instance, length], 2))
        at = end
    return [*chunks, Chunk("raw", context[at:])] if at < len(context) else chunks


def _device(data: bytes) -> Chunk:
    name_bytes, reserved, data_bytes = DEVICE_HEAD.unpack_from(data)
    name = data[DEVICE_HEAD.size :][:name_bytes]
    fields = [name_bytes, reserved, data_bytes, *name]
    return Chunk(
        f"device {name.decode()}", data[DEVICE_HEAD.size + name_bytes :], _DEVICE + (1,) * len(name), fields, 2
    )


class Mutation:
    """Changes drawn by chance.

    Args:
        draw: the chance.
        graft: returns a chunk of something else, to be put in.
        keeps: strings that stay as they are.

    Attributes:
        touched: the names of the chunks that were changed, put in or left out.
    """

    def __init__(
        self, draw: random.Random, graft: Callable[[], Chunk | None], keeps: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._draw = draw
        self._graft = graft
        self._keeps = keeps
        self._gentle = False  # change bodies alone, which leaves all lengths and the order right
        self.touched: set[str] = set()

    def of(self, turns: Sequence[list[Chunk]]) -> list[list[Chunk]]:
        """Return a changed copy of lists of chunks."""
        turns = [[_copied(chunk) for chunk in chunks] for chunks in turns]
        self._gentle = self._draw.random() < 0.5
        for _ in range(self._draw.randint(1, _MOST_CHANGES) if self._draw.random() < 0.5 else 1):
            self._change(turns)
        return turns

    def _change(self, turns: list[list[Chunk]]) -> None:
        draw = self._draw
        if not self._gentle and draw.random() < 0.1:
            self._reorder(turns)
            return
        places: dict[str, list[tuple[list[Chunk], int]]] = {}
        for siblings, at in _places(turns):
            if not self._gentle or (siblings[at].body and isinstance(siblings[at].body, bytes)):
                places.setdefault(siblings[at].name, []).append((siblings, at))
        if not places:
            return
        siblings, at = draw.choice(places[draw.choice(sorted(places))])
        chunk = siblings[at]
        self.touched.add(chunk.name)
        what = "body" if self._gentle else draw.choice(_WAYS)
        if what == "body" and isinstance(chunk.body, bytes):
            chunk.body = self.bytes(chunk.body)
        elif what in ("body", "field") and chunk.fields:
            chosen = draw.randrange(len(chunk.fields))
            if chosen == chunk.length_at:
                chunk.lie = draw.choice((-1, 1))
            else:
                chunk.fields[chosen] = self._number(chunk.fields[chosen])
        elif what == "lie":
            chunk.lie = draw.choice((-8, -1, 1, 8, 1 << 16, 1 << 27, 1 << 31, -1 << 30))
        elif what == "drop":
            del siblings[at]
        elif what == "repeat":
            siblings[at:at] = [_copied(chunk) for _ in range(draw.choice((1, 1, 2, 40)))]
        elif what == "swap":
            other = draw.randrange(len(siblings))
            self.touched.add(siblings[other].name)
            siblings[at], siblings[other] = siblings[other], siblings[at]
        elif (grafted := self._graft()) is not None:
            self.touched.add(grafted.name)
            siblings.insert(at, _copied(grafted))

    def _reorder(self, turns: list[list[Chunk]]) -> None:
        draw = self._draw
        at, other = draw.randrange(len(turns)), draw.randrange(len(turns))
        self.touched |= {chunk.name for turn in (turns[at], turns[other]) for chunk in turn}
        what = draw.choice(("drop", "repeat", "swap", "merge", "stop", "short"))
        if what == "drop":
            turns[at] = []
        elif what == "repeat":
            turns[at] = [*turns[at], *map(_copied, turns[at])]
        elif what == "swap":
            turns[at], turns[other] = turns[other], turns[at]
        elif what == "merge":
            turns[at], turns[other] = [*turns[at], *(turns[other] if at != other else [])], []
        else:
            data = joined(turns[at])
            kept = data[: draw.randrange(len(data) + 1)] if what == "short" else data
            turns[at] = [Chunk("raw", kept)]
            for each in turns[at + 1 :]:
                each.clear()

    def bytes(self, data: bytes) -> bytes:
        """Return changed bytes: of JSON most often another JSON text."""
        draw = self._draw
        if data[:1] in (b"{", b"[") and draw.random() < 0.8:
            try:
                return json.dumps(self.json(json.loads(data))).encode()
            except (ValueError, RecursionError):
                pass
        changed = bytearray(data)
        what = draw.choice(("word", "word", "word", "bit", "bit", "cut", "more", "copy", "noise"))
        if what == "word" and changed:
            width = draw.choice((1, 2, 4, 8))
            at = draw.randrange(len(changed)) // width * width
            word = self._number(int.from_bytes(changed[at : at + width], "little"))
            changed[at : at + width] = (word % (1 << 8 * width)).to_bytes(width, "little")
        elif what == "bit" and changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        elif what == "cut":
            begin = draw.randrange(len(changed) + 1)
            del changed[begin : draw.choice((len(changed), begin + 1, begin + 8))]
        elif what == "copy" and changed:
            begin, to = draw.randrange(len(changed)), draw.randrange(len(changed))
            size = draw.choice((1, 4, 8, 64))
            changed[to : to + size] = changed[begin : begin + size]
        else:
            at = draw.randrange(len(changed) + 1)
            size = draw.choice((1, 4, 8, 300))
            changed[at : at + (size if what == "noise" else 0)] = draw.randbytes(size)
        return bytes(changed)

    def _number(self, value: int) -> int:
        draw = self._draw
        return draw.choice(
            (draw.choice(_NUMBERS), value + draw.choice((-8, -1, 1, 8)), value ^ 1 << draw.randrange(64))
        )

    def json(self, value: Any) -> Any:  # any JSON value
        """Return a changed copy of a JSON value."""
        draw = self._draw
        if isinstance(value, dict | list) and value and draw.random() < 0.8:
            keys = sorted(value) if isinstance(value, dict) else range(len(value))
            key, changed = draw.choice(keys), value.copy()
            what = draw.choice(("deeper", "deeper", "deeper", "drop", "repeat"))
            if what == "deeper":
                changed[key] = self.json(changed[key])
            elif what == "drop":
                del changed[key]
            elif isinstance(changed, list):
                changed[key:key] = [changed[key]] * draw.choice((1, 100, 2000))
            else:
                changed[self.text(key)] = changed[key]
            return changed
        if isinstance(value, str):
            return value if self._keeps(value) else draw.choice((self.text(value), draw.choice(_VALUES)))
        if type(value) is int and draw.random() < 0.6:
            return self._number(value)
        return draw.choice(_VALUES)

    def text(self, text: str) -> str:
        """Return a changed text."""
        draw = self._draw
        at = draw.randrange(len(text) + 1)
        return draw.choice(
            (text[:at], text[:at] + draw.choice(string.printable) + text[at + 1 :], text * 3, text.upper())
        )


def _copied(chunk: Chunk) -> Chunk:
    body = chunk.body if isinstance(chunk.body, bytes) else [_copied(each) for each in chunk.body]
    return replace(chunk, body=body, fields=list(chunk.fields))


def _places(turns: Sequence[list[Chunk]]) -> Iterator[tuple[list[Chunk], int]]:
    for siblings in turns:
        for at, chunk in enumerate(siblings):
            yield siblings, at
            if not isinstance(chunk.body, bytes):
                yield from _places([chunk.body])


def names_in(turns: Sequence[list[Chunk]]) -> list[str]:
    """Return the names of all chunks, in order."""
    return [siblings[at].name for siblings, at in _places(turns)]


def any_chunk(turns: Sequence[list[Chunk]], draw: random.Random) -> Chunk | None:
    """Return one of the chunks."""
    places = list(_places(turns))
    if not places:
        return None
    siblings, at = draw.choice(places)
    return siblings[at]
