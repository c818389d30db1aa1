"""Remembers TLB fills; machine code repeats them as long as the guest's page tables are unchanged.

A guest flushes its TLB at every change of address space, on a kernel with separated page tables twice for each system
call, and the emulator's TLB knows no global pages: the same few dozen pages are asked for again and again. So each
answer for plain RAM is kept with what it rests on: the access, the privilege level, CR0, CR3, CR4, EFER, and the four
entries of the guest's tables, or of its shadows, that the walk went through. If all of that is as it was, so is the
answer, whatever the guest flushed in between; what it rests on in the P2M, and on shadows that are blown, is forgotten
with every flush of ours. All else is walked. Nothing rests on CR4.PGE: a kernel clears and sets it to flush everything.

In Python that comparison costs half of a walk. On an x86-64 host it is machine code, called as the emulator's callback
(gva in RSI, access in EDX, the answer's address in RCX, ours in R8); what it cannot answer it passes on::

          mov  r9, [r8]                            # the CPU's fields
          mov  r10, [r9 + CR3]
          mov  rax, [r8 + 8] ; cmp rax, [r9 + CR0]  ; jne walk
          mov  rax, [r9 + CR4]; and rax, ~PGE; cmp rax, [r8 + 16]; jne walk
          mov  rax, [r8 + 24]; cmp rax, [r9 + EFER] ; jne walk
          mov  eax, [r9 + HFLAGS]; and eax, 3; shl eax, 8
          or   rax, rsi; mov r9d, edx; or rax, r9  # the key: gva, level, access
          mov  r11, rsi; shr r11, 12; shr r10, 12; xor r11, r10
          shl  r11, 2; and r9d, 3; add r11, r9; mov r9, rax
          and  r11d, SETS - 1; shl r11, 7; lea r11, [r8 + r11 + 128]
          cmp  r9, [r11]      ; jne other
          cmp  r10, [r11 + 8] ; jne other          # CR3's page
          mov  rax, [r11 + 16]; mov rax, [rax]; cmp rax, [r11 + 24]; jne other
          ...                                      # the same at 32, 48 and 64
          mov  rax, [r11 + 80]; mov [rcx], rax
          mov  eax, [r11 + 88]; mov [rcx + 8], eax
          mov  eax, 1; ret
    other: add r11, SETS * 128                     # the second of the two slots where it may be
          ...                                      # the same, but: jne walk
    walk: jmp  [r8 + 32]

On other hosts every miss is walked.

Source: AMD APM volume 2, 5.5 (what may make a translation stale); measured.
"""

import ctypes
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from pageferry.hypervisor.countdown import NATIVE_HOSTS, executable
from pageferry.hypervisor.registers import CR4_PGE
from pageferry.hypervisor.unicorn_cpu import CpuFields

#: An answer may be in one of two slots; the first has the newer.
_SETS, _WAYS = 16384, 2
_SLOT_BYTES, _HEADER_BYTES = 128, 128
_HEADER = struct.Struct("<5Q")  # the CPU's fields; CR0, CR4, EFER; who walks
_SLOT = struct.Struct("<12Q")
_KEY = struct.Struct("<2Q")  # what a slot begins with
_WAY_BYTES = _SETS * _SLOT_BYTES
_CPL_SHIFT, _ACCESS_BITS = 8, 3
_PAGE_SHIFT = 12
_NO_CONTROLS = (1 << 64) - 1


class TlbMemory:
    """The memory of one vCPU's TLB.

    Args:
        hva: host address of machine memory; it stays mapped as long as anything is remembered.
    """

    def __init__(self, hva: int) -> None:
        self._hva = hva
        self._native = platform.machine() in NATIVE_HOSTS
        slots = _WAYS * _SETS
        self._table = ctypes.create_string_buffer(_HEADER_BYTES + slots * _SLOT_BYTES)
        self._view = memoryview(self._table).cast("B")
        self._keys = np.frombuffer(self._view, np.uint64, offset=_HEADER_BYTES).reshape(slots, _SLOT_BYTES // 8)[:, 0]
        self._maddrs = memoryview(bytearray(8 * slots)).cast("Q")  # each slot's answer once more, to be searched
        self._fields = 0
        self._walk: Any = None
        self._address_of_walk: int | None = None
        self._empty = True

    def attach(self, fields: CpuFields, walk: Any) -> tuple[Any, int]:  # noqa: ANN401
        """Serve another engine's CPU; return the callback for its TLB misses, and what that must be given.

        Args:
            fields: the CPU's.
            walk: a C callback that answers what is not remembered; kept alive here.
        """
        self._fields, self._walk = ctypes.addressof(fields), walk
        self._address_of_walk = ctypes.cast(walk, ctypes.c_void_p).value
        self.follow(0, 0, 0)
        callback = ctypes.c_void_p(_machine_code()) if self._native else walk
        return callback, ctypes.addressof(self._table)

    def forget(self) -> None:
        """Remember nothing of what was told so far."""
        if self._empty:
            return
        self._empty = True
        ctypes.memset(ctypes.addressof(self._table) + _HEADER_BYTES, 0, _WAYS * _SETS * _SLOT_BYTES)

    def forget_page(self, maddr: int) -> None:
        """Remember nothing of what was told about one page of machine memory."""
        self._keys[np.flatnonzero(np.frombuffer(self._maddrs, np.uint64) == maddr)] = 0

    @contextmanager
    def unused(self) -> Iterator[None]:
        """Answer nothing for the length of a ``with`` block; what is remembered stays."""
        header = bytes(self._view[: _HEADER.size])
        _HEADER.pack_into(self._view, 0, self._fields, _NO_CONTROLS, 0, 0, self._address_of_walk)
        try:
            yield
        finally:
            self._view[: _HEADER.size] = header

    def follow(self, cr0: int, cr4: int, efer: int) -> None:
        """Remember from now on what is told under these controls, and nothing of before."""
        _HEADER.pack_into(self._view, 0, self._fields, cr0, cr4 & ~CR4_PGE, efer, self._address_of_walk)
        self.forget()

    def remember(
        self, key: tuple[int, int, int], cr3: int, rests_on: tuple[int, ...], maddr: int, permissions: int
    ) -> None:
        """Keep an answer.

        Args:
            key: the page's gva, the access, the privilege level.
            cr3: the guest's.
            rests_on: four times the word index of a page-table entry, and what it was.
            maddr: the answer: where the page is,
            permissions: and what may be done to it.
        """
        self._empty = False
        gva, access, cpl = key
        page = cr3 >> _PAGE_SHIFT
        slot = ((gva >> _PAGE_SHIFT ^ page) << 2) + (access & _ACCESS_BITS) & _SETS - 1
        at, word = _HEADER_BYTES + slot * _SLOT_BYTES, gva | cpl << _CPL_SHIFT | access
        view, maddrs = self._view, self._maddrs
        was = _KEY.unpack_from(view, at)
        if was[0] and was != (word, page):
            view[at + _WAY_BYTES : at + _WAY_BYTES + _SLOT.size] = view[at : at + _SLOT.size]
            maddrs[slot + _SETS] = maddrs[slot]
        maddrs[slot] = maddr
        at_4, was_4, at_3, was_3, at_2, was_2, at_1, was_1 = rests_on
        hva = self._hva
        _SLOT.pack_into(
            view,
            at,
            word,
            page,
            *(hva + 8 * at_4, was_4, hva + 8 * at_3, was_3, hva + 8 * at_2, was_2, hva + 8 * at_1, was_1),
            maddr,
            permissions,
        )


@cache
def _machine_code() -> int:
    """Return the address of the callback, made once for the process."""
    code, jumps = bytearray(), list[int]()

    def emit(text: str, displacement: int | None = None) -> None:
        code.extend(bytes.fromhex(text))
        if displacement is not None:
            code.extend(struct.pack("<i", displacement))

    def leave_unless_equal() -> None:
        emit("0f85", 0)
        jumps.append(len(code))

    def leave_to_here(first: int) -> None:
        for after in jumps[first:]:
            struct.pack_into("<i", code, after - 4, len(code) - after)
        del jumps[first:]

    emit("4d8b08")
    emit("4d8b91", CpuFields.cr.offset + 8 * 3)
    emit("498b4008 493b81", CpuFields.cr.offset)
    leave_unless_equal()
    emit("498b81", CpuFields.cr.offset + 8 * 4)
    emit("4825", ~CR4_PGE)
    emit("493b4010")
    leave_unless_equal()
    emit("498b4018 493b81", CpuFields.efer.offset)
    leave_unless_equal()
    emit("418b81", CpuFields.hflags.offset)
    emit("83e003 c1e008 4809f0 4189d1 4c09c8")
    emit("4989f3 49c1eb0c 49c1ea0c 4d31d3 49c1e302 4183e103 4d01cb 4989c1")
    emit("4181e3", _SETS - 1)
    emit("49c1e307 4f8d9c18", _HEADER_BYTES)
    to_walk = len(jumps)
    for way in range(_WAYS):
        if way:
            leave_to_here(to_walk)
            emit("4981c3", _WAY_BYTES)
        emit("4d3b0b")
        leave_unless_equal()
        emit("4d3b5308")
        leave_unless_equal()
        for at in (16, 32, 48, 64):
            emit(f"498b43{at:02x} 488b00 493b43{at + 8:02x}")
            leave_unless_equal()
        emit("498b4350 488901 418b4358 894108 b801000000 c3")
    leave_to_here(0)
    emit("41ff6020")
    return executable(bytes(code))
