"""What the TLB was told, told again by machine code while the guest's page tables still say the same.

A guest flushes its TLB at every change of address space, on a kernel with separated page tables twice for each system
call, and the emulator's TLB knows no global pages: the same few dozen pages are asked for again and again. So each
answer for plain RAM is kept with what it rests on: the access, the privilege level, CR0, CR3, CR4, EFER, and the four
entries of the guest's tables, or of its shadows, that the walk went through. If all of that is as it was, so is the
answer, whatever the guest flushed in between; what it rests on in the P2M, and on shadows that are blown, is forgotten
with every flush of ours. All else is walked.

In Python that comparison costs half of a walk. On an x86-64 host it is machine code, called as the emulator's callback
(gva in RSI, access in EDX, the answer's address in RCX, ours in R8); what it cannot answer it passes on::

          mov  r9, [r8]                            # the CPU's fields
          mov  r10, [r9 + CR3]
          mov  rax, [r8 + 8] ; cmp rax, [r9 + CR0]  ; jne walk
          mov  rax, [r8 + 16]; cmp rax, [r9 + CR4]  ; jne walk
          mov  rax, [r8 + 24]; cmp rax, [r9 + EFER] ; jne walk
          mov  eax, [r9 + HFLAGS]; and eax, 3; shl eax, 8
          or   rax, rsi; mov r9d, edx; or rax, r9  # the key: gva, level, access
          mov  r11, rsi; shr r11, 12; shr r10, 12; xor r11, r10
          shl  r11, 2; and r9d, 3; add r11, r9
          and  r11d, SLOTS - 1; shl r11, 7; lea r11, [r8 + r11 + 128]
          cmp  rax, [r11]     ; jne walk
          cmp  r10, [r11 + 8] ; jne walk           # CR3's page
          mov  rax, [r11 + 16]; mov rax, [rax]; cmp rax, [r11 + 24]; jne walk
          ...                                      # the same at 32, 48 and 64
          mov  rax, [r11 + 80]; mov [rcx], rax
          mov  eax, [r11 + 88]; mov [rcx + 8], eax
          mov  eax, 1; ret
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
from pageferry.hypervisor.unicorn_cpu import CpuFields

_SLOTS = 16384
_SLOT_BYTES, _HEADER_BYTES = 128, 128
_HEADER = struct.Struct("<5Q")  # the CPU's fields; CR0, CR4, EFER; who walks
_SLOT = struct.Struct("<12Q")
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
        self._table = ctypes.create_string_buffer(_HEADER_BYTES + _SLOTS * _SLOT_BYTES)
        self._view = memoryview(self._table).cast("B")
        self._keys = np.frombuffer(self._view, np.uint64, offset=_HEADER_BYTES).reshape(_SLOTS, _SLOT_BYTES // 8)[:, 0]
        self._maddrs = memoryview(bytearray(8 * _SLOTS)).cast("Q")  # each slot's answer once more, to be searched
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
        ctypes.memset(ctypes.addressof(self._table) + _HEADER_BYTES, 0, _SLOTS * _SLOT_BYTES)

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
        _HEADER.pack_into(self._view, 0, self._fields, cr0, cr4, efer, self._address_of_walk)
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
        slot = ((gva >> _PAGE_SHIFT ^ page) << 2) + (access & _ACCESS_BITS) & _SLOTS - 1
        at_4, was_4, at_3, was_3, at_2, was_2, at_1, was_1 = rests_on
        hva = self._hva
        self._maddrs[slot] = maddr
        _SLOT.pack_into(
            self._view,
            _HEADER_BYTES + slot * _SLOT_BYTES,
            gva | cpl << _CPL_SHIFT | access,
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

    def walk_unless_equal() -> None:
        emit("0f85", 0)
        jumps.append(len(code))

    emit("4d8b08")
    emit("4d8b91", CpuFields.cr.offset + 8 * 3)
    for at, field in ((8, CpuFields.cr.offset), (16, CpuFields.cr.offset + 8 * 4), (24, CpuFields.efer.offset)):
        emit(f"498b40{at:02x} 493b81", field)
        walk_unless_equal()
    emit("418b81", CpuFields.hflags.offset)
    emit("83e003 c1e008 4809f0 4189d1 4c09c8")
    emit("4989f3 49c1eb0c 49c1ea0c 4d31d3 49c1e302 4183e103 4d01cb")
    emit("4181e3", _SLOTS - 1)
    emit("49c1e307 4f8d9c18", _HEADER_BYTES)
    emit("493b03")
    walk_unless_equal()
    emit("4d3b5308")
    walk_unless_equal()
    for at in (16, 32, 48, 64):
        emit(f"498b43{at:02x} 488b00 493b43{at + 8:02x}")
        walk_unless_equal()
    emit("498b4350 488901 418b4358 894108 b801000000 c3")
    for after in jumps:
        struct.pack_into("<i", code, after - 4, len(code) - after)
    emit("41ff6020")
    return executable(bytes(code))
