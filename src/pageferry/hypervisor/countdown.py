"""Stops a vCPU exactly: each block of code checks, before it begins, whether it may.

``uc_emu_stop`` from another thread is not exact: between chained blocks it leaves RIP behind, and what was executed is
executed again. A callback before a block is: RIP is up to date there, and a stop asked for by the block's own thread
comes before its first instruction. A block does not begin when the count of blocks is over, or when an interrupt waits
and the guest takes interrupts now: IF is set, and no interrupt shadow holds them off. What sets IF ends its block, so
that is the very instruction at which hardware would take it.

The callback runs once for every few instructions, so in Python it would cost more than the guest. On an x86-64 host it
is a few bytes of machine code, called with the address of a :class:`_Cell` in RCX::

          sub  dword ptr [rcx], 1             # left
          jle  stop
          cmp  dword ptr [rcx + 4], 0         # interrupt, hurry
          jne  look
    done: ret
    look: cmp  word ptr [rcx + 6], 0          # hurry
          jne  stop
          mov  rax, [rcx + 16]                # eflags
          test dword ptr [rax], 0x200
          jz   done
          mov  rax, [rcx + 24]                # hflags
          test dword ptr [rax], 8
          jnz  done
    stop: mov  dword ptr [rcx + 8], 1         # stopped
          movabs rax, uc_emu_stop             # its argument, the engine, is the first here too
          jmp  rax

Another thread stops the vCPU by writing ``hurry``, which nothing but :meth:`Countdown.ready` takes back.

On other hosts the same is done in Python: right, and slow.
"""

import ctypes
import mmap
import platform
from functools import cache
from typing import Any

from unicorn.unicorn_py3.unicorn import uclib

from pageferry.hypervisor.unicorn_cpu import Cpu, CpuFields

_BLOCK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)
#: Hosts that the machine code here is for.
NATIVE_HOSTS = ("x86_64", "AMD64")
_IF, _INHIBIT_IRQ = 1 << 9, 1 << 3
_LOOK = bytes.fromhex(
    "832901 7e26 83790400 7501 c3 6683790600 7518 488b4110 f70000020000 74ec 488b4118 f70008000000 75e0"
    "c7410801000000 48b8"
)
_JUMP = bytes.fromhex("ffe0")


class _Cell(ctypes.Structure):
    _fields_ = (
        ("left", ctypes.c_int32),
        ("interrupt", ctypes.c_int16),
        ("hurry", ctypes.c_int16),
        ("stopped", ctypes.c_int32),
        ("eflags", ctypes.c_uint64),
        ("hflags", ctypes.c_uint64),
    )


class Countdown:
    """The count of one engine and its callback.

    ``address`` is what the callback must be given; this object lives as long as the engine.

    Args:
        cpu: the engine's.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        at = ctypes.addressof(cpu.fields)
        self._cell = _Cell(eflags=at + CpuFields.eflags.offset, hflags=at + CpuFields.hflags.offset)
        self.address = ctypes.addressof(self._cell)
        native = platform.machine() in NATIVE_HOSTS
        self.callback: Any = ctypes.c_void_p(_machine_code()) if native else _BLOCK(self._look)

    def ready(self) -> None:
        """Take note of what others ask from now on: before looking at what they have asked."""
        self._cell.hurry = 0

    def start(self, blocks: int, *, interrupt: bool) -> None:
        """Let so many blocks begin from now on; ``interrupt``: one waits."""
        self._cell.stopped = 0
        self._cell.interrupt = interrupt
        self._cell.left = blocks + 1

    @property
    def stopped(self) -> bool:
        """Whether a block did not begin since."""
        return bool(self._cell.stopped)

    def hurry(self) -> None:
        """Let no other block begin until :meth:`ready`; any thread."""
        self._cell.hurry = 1

    def interrupt(self) -> None:
        """Let no block begin once the guest takes interrupts; any thread."""
        self._cell.interrupt = 1

    def _look(self, engine: int, _gva: int, _size: int, _data: int) -> None:
        cell, fields = self._cell, self._cpu.fields
        cell.left -= 1
        taken = cell.interrupt and fields.eflags & _IF and not fields.hflags & _INHIBIT_IRQ
        if cell.left <= 0 or cell.hurry or taken:
            cell.stopped = 1
            uclib.uc_emu_stop(ctypes.c_void_p(engine))


@cache
def _machine_code() -> int:
    """Return the address of the callback, made once for the process."""
    stop = ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value
    assert stop is not None
    return executable(_LOOK + stop.to_bytes(8, "little") + _JUMP)


def executable(code: bytes) -> int:
    """Return the address of machine code, at most a page, that stays there until the process ends."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    _pages.append(page)
    return ctypes.addressof(ctypes.c_char.from_buffer(page))


# SAFETY: every engine calls into these pages: they stay mapped until the process ends.
_pages: list[mmap.mmap] = []
