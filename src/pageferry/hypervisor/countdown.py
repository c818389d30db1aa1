"""How a vCPU is stopped exactly: each block of code counts down before it begins, and the last one does not begin.

``uc_emu_stop`` from another thread is not exact: between chained blocks it leaves RIP behind, and what was executed is
executed again. A callback before a block is: RIP is up to date there, and a stop asked for by the block's own thread
comes before its first instruction. But it runs once for every few instructions, so in Python it would cost more than
the guest. On an x86-64 host it is a few bytes of machine code, called with the address of the count in RCX::

    sub  dword ptr [rcx], 1
    jg   done
    mov  dword ptr [rcx + 4], 1
    movabs rax, uc_emu_stop     # its argument, the engine, is the first here too
    jmp  rax
    done: ret

Another thread stops the vCPU by writing 0 to the count. That may be lost to a block that counts at the same instant.

On other hosts the same is done in Python: right, and slow.
"""

import ctypes
import mmap
import platform
from functools import cache
from typing import Any

from unicorn.unicorn_py3.unicorn import uclib

_BLOCK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)
_NATIVE_HOSTS = ("x86_64", "AMD64")


class _Cell(ctypes.Structure):
    _fields_ = (("left", ctypes.c_int32), ("stopped", ctypes.c_int32))


class Countdown:
    """The count of one engine and its callback.

    ``address`` is what the callback must be given; this object lives as long as the engine.
    """

    def __init__(self) -> None:
        self._cell = _Cell()
        self.address = ctypes.addressof(self._cell)
        native = platform.machine() in _NATIVE_HOSTS
        self.callback: Any = ctypes.c_void_p(_machine_code()) if native else _BLOCK(self._count)

    def start(self, blocks: int) -> None:
        """Let so many blocks begin from now on."""
        self._cell.stopped = 0
        self._cell.left = blocks + 1

    @property
    def stopped(self) -> bool:
        """Whether the count has stopped the engine since."""
        return bool(self._cell.stopped)

    def hurry(self) -> None:
        """Let no other block begin; any thread."""
        self._cell.left = 0

    def _count(self, engine: int, _gva: int, _size: int, _data: int) -> None:
        self._cell.left -= 1
        if self._cell.left <= 0:
            self._cell.stopped = 1
            uclib.uc_emu_stop(ctypes.c_void_p(engine))


@cache
def _machine_code() -> int:
    """Return the address of the callback, made once for the process."""
    stop = ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value
    assert stop is not None
    code = bytes.fromhex("832901 7f13 c7410401000000 48b8") + stop.to_bytes(8, "little") + bytes.fromhex("ffe0 c3")
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    _pages.append(page)
    return ctypes.addressof(ctypes.c_char.from_buffer(page))


# SAFETY: every engine calls into this page: it stays mapped until the process ends.
_pages: list[mmap.mmap] = []
