"""The table window's short way: a guest writes a page-table entry from which no shadow was made yet.

Most writes to guest tables are of that kind: a kernel fills tables in long before it uses what they map. Such a write
has nothing to drop: it is a store, and a count. In Python it would cost a hundred times as much, so on an x86-64 host
it is machine code, for a domain with one vCPU: several would need the SHADOW lock between the store and the look at the
shadow. Each gfn has a place of four words, behind a header::

    header   who reads, who writes in Python; how many gfns; stores done here
    a gfn    where its page is, 0: not known | where its only shadow is, 0: it has none, or several |
             how often it was written since it was last used as a table | -

A window is read, (offset in RSI, size in EDX, this table in RCX), and written (value in RCX, this table in R8), by::

    read:  cmp rsi >> 12, [rcx + 16] ; jae [rcx]
           mov rax, [place] ; test rax, rax ; jz [rcx]
           add rax, rsi & 0xfff ; load of that size ; ret
    write: cmp rsi >> 12, [r8 + 16] ; jae [r8 + 8]
           mov r10, [place] ; mov r11, [place + 8]   ; either is 0: jz [r8 + 8]
           cmp [place + 16], LIMIT - 1 ; jae [r8 + 8]
           (rsi & 7) + edx > 8         ; ja [r8 + 8]
           cmp [r11 + (rsi & 0xff8)], 0 ; jne [r8 + 8]  # a shadow entry was made of it: that goes first
           store of that size ; inc [place + 16] ; inc [r8 + 24] ; ret
"""

import ctypes
import platform
import struct
from functools import cache
from typing import Any

import numpy as np

from pageferry.core.frames import PAGE_SHIFT
from pageferry.hypervisor.countdown import NATIVE_HOSTS, executable
from pageferry.hypervisor.machine_memory import MachineMemory

#: So many writes to a guest table, and no use of it meanwhile: it is something else by now, most probably.
NO_TABLE_ANY_MORE = 512
_HEADER_WORDS, _PLACE_WORDS = 4, 4
_READER, _WRITER, _GFNS, _STORES = range(_HEADER_WORDS)
_PAGE, _SHADOW, _WRITES = range(3)


class TableWindow:
    """What is known of each guest page that may be a page table; the SHADOW lock guards it against all but the vCPU.

    Args:
        machine: machine memory.
        gfns: how many guest frames; one beyond them has no short way.
        vcpus: how many vCPUs the domain has.
    """

    def __init__(self, machine: MachineMemory, gfns: int, *, vcpus: int) -> None:
        self._hva = machine.mapping.hva
        self._gfns = gfns
        self._table = np.zeros(_HEADER_WORDS + gfns * _PLACE_WORDS, np.uint64)
        self._words = memoryview(self._table)  # type: ignore[arg-type]  # a numpy array is a buffer
        self._words[_GFNS] = gfns
        self._native = vcpus == 1 and platform.machine() in NATIVE_HOSTS
        self._callbacks: tuple[Any, Any] | None = None

    def attach(self, read: Any, write: Any) -> tuple[Any, Any, int | None]:  # noqa: ANN401
        """Return the callbacks for a vCPU's window, and what they must be given; ``read`` and ``write`` do the rest."""
        if not self._native:
            return read, write, None
        self._callbacks = read, write
        for word, callback in ((_READER, read), (_WRITER, write)):
            self._words[word] = ctypes.cast(callback, ctypes.c_void_p).value or 0
        reader, writer = _machine_code()
        return ctypes.c_void_p(reader), ctypes.c_void_p(writer), self._table.ctypes.data

    @property
    def stores(self) -> int:
        """How many writes were done here."""
        return self._words[_STORES]

    def open(self, gfn: int, mfn: int) -> None:
        """Take note of where a page is which the guest is about to write through the window; until the next flush."""
        if gfn < self._gfns:
            self._words[_at(gfn) + _PAGE] = self._hva + (mfn << PAGE_SHIFT)

    def shadowed(self, gfn: int, mfns: list[int]) -> None:
        """Take note of all the shadows that a page has now."""
        if gfn < self._gfns:
            self._words[_at(gfn) + _SHADOW] = self._hva + (mfns[0] << PAGE_SHIFT) if len(mfns) == 1 else 0

    def only_shadow(self, gfn: int) -> int | None:
        """Return the mfn of the shadow that is on record for a page; for the audit."""
        hva = self._words[_at(gfn) + _SHADOW] if gfn < self._gfns else 0
        return hva - self._hva >> PAGE_SHIFT if hva else None

    def used(self, gfn: int) -> None:
        """Take note that a page was used as a table."""
        if gfn < self._gfns:
            self._words[_at(gfn) + _WRITES] = 0

    def written(self, gfn: int) -> bool:
        """Count a write that was not done here; tell whether the page is most probably no table any more."""
        if gfn >= self._gfns:
            return False
        writes = self._words[_at(gfn) + _WRITES] + 1
        done = writes >= NO_TABLE_ANY_MORE
        self._words[_at(gfn) + _WRITES] = 0 if done else writes
        return done


def _at(gfn: int) -> int:
    return _HEADER_WORDS + gfn * _PLACE_WORDS


@cache
def _machine_code() -> tuple[int, int]:
    """Return the addresses of the callbacks that read and write, made once for the process."""
    return executable(_reader()), executable(_writer())


def _reader() -> bytes:
    code = _Code()
    code.emit("4889f0 48c1e80c 483b4110")
    code.leave("0f83")
    code.emit("48c1e005 488b440120 4885c0")  # place: rcx + 32 + 32 * gfn
    code.leave("0f84")
    code.emit("81e6ff0f0000 4801f0")
    # by size: 8, 4, 2, 1
    code.emit("83fa08 7504 488b00c3 83fa04 7503 8b00c3 83fa02 7504 0fb700c3 0fb600c3")
    return code.end("ff21")


def _writer() -> bytes:
    code = _Code()
    code.emit("4889f0 48c1e80c 493b4010")
    code.leave("0f83")
    code.emit("48c1e005 4d8d4c0020")  # r9: place
    code.emit("4d8b11 4d85d2")
    code.leave("0f84")
    code.emit("4d8b5908 4d85db")
    code.leave("0f84")
    code.emit("49817910", NO_TABLE_ANY_MORE - 1)
    code.leave("0f83")
    code.emit("89f0 83e007 01d0 83f808")
    code.leave("0f87")
    code.emit("89f0 25f80f0000 49833c0300")
    code.leave("0f85")
    code.emit("89f0 25ff0f0000 4901c2")
    code.emit("83fa08 7505 49890aeb19 83fa04 7505 41890aeb0f 83fa02 7506 6641890aeb04 41880a90")
    code.emit("49ff4110 49ff4018 c3")
    return code.end("41ff6008")


class _Code:
    """Machine code, with jumps to its end: what it cannot do is done in Python."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._jumps: list[int] = []

    def emit(self, text: str, immediate: int | None = None) -> None:
        self._code.extend(bytes.fromhex(text))
        if immediate is not None:
            self._code.extend(struct.pack("<i", immediate))

    def leave(self, jump: str) -> None:
        """Go to the end, where the flags say so."""
        self.emit(jump, 0)
        self._jumps.append(len(self._code))

    def end(self, text: str) -> bytes:
        for after in self._jumps:
            struct.pack_into("<i", self._code, after - 4, len(self._code) - after)
        self.emit(text)
        return bytes(self._code)
