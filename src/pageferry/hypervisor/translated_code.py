"""Code that changes: which pages the emulator has translated code of, and which may be written through its TLB.

The emulator sees the first store through a TLB entry to a page from which it has translated code, and forgets what that
store hits. Later stores, through this entry or another gva of the page, it misses: a kernel that compiles a filter over
a freed one would run into the old one. So no page is writable in the TLB while there is translated code of it::

    fetch                           never with WRITE; if the page may be writable in the TLB, that is flushed
    read of a page with code        without WRITE: the first store comes here again
    write to a page with code       allowed, and all code of the page forgotten
    written by a device, the host   all code of the page forgotten

Flushing and forgetting wait for the next block of code, before which the vCPU is stopped.
"""

from collections.abc import Callable

import numpy as np

from pageferry.core.frames import PAGE_SHIFT
from pageferry.hypervisor import unicorn_api as api
from pageferry.hypervisor.machine import MachineMemory
from pageferry.hypervisor.paging import Tlb
from pageferry.hypervisor.tlb_memory import TlbMemory


class TranslatedCode:
    """The pages of one vCPU, by machine address.

    Args:
        machine: machine memory.
        tlb: the vCPU's, which collects what was written behind its back.
        tlb_memory: of the same TLB.
        hurry: stops the vCPU before its next block of code.
    """

    def __init__(self, machine: MachineMemory, tlb: Tlb, tlb_memory: TlbMemory, hurry: Callable[[], None]) -> None:
        self._machine = machine
        self._tlb = tlb
        self._tlb_memory = tlb_memory
        self._hurry = hurry
        self._code: set[int] = set()
        self._writable: set[int] = set()  # may be writable in the TLB
        self._overwritten: list[int] = []  # code, and written since this block
        self._flush_wanted = False

    def clear(self) -> None:
        """Begin with a fresh emulator, which has translated nothing."""
        self._code.clear()
        self._writable.clear()
        self._overwritten.clear()
        self._flush_wanted = False
        self._tlb.holds_code = False
        self._tlb.written.clear()

    def permit(self, maddr: int, permissions: int, *, write: bool, fetch: bool) -> int:
        """Return what of ``permissions`` the TLB may be told for an access to a page."""
        if fetch:
            if maddr not in self._code:
                self._code.add(maddr)
                self._tlb.holds_code = True
                if maddr in self._writable:
                    self._writable.discard(maddr)
                    self._tlb_memory.forget_page(maddr)
                    self._flush_wanted = True
                    self._hurry()
            return permissions & ~api.WRITE
        if maddr in self._code:
            if not write:
                return permissions & ~api.WRITE
            self._overwritten.append(maddr)
            self._hurry()
        if permissions & api.WRITE:
            self._writable.add(maddr)
        return permissions

    def take_written(self) -> list[int]:
        """Return the pages whose code is to be forgotten now: they hold none any more; the TLB is to be flushed."""
        if not (self._overwritten or self._tlb.written):
            return []
        stale, self._overwritten = self._overwritten, []
        stale += self._written_by_others()
        for maddr in stale:
            self._tlb_memory.forget_page(maddr)
        self._code.difference_update(stale)
        self._flush_wanted = self._flush_wanted or bool(stale)
        return stale

    def _written_by_others(self) -> list[int]:
        written = []
        while self._tlb.written:
            written.append(self._tlb.written.popleft())
        if not written:
            return []
        code = np.fromiter(self._code, np.uint64, len(self._code))
        gfns = self._machine.m2p.gfns(code >> np.uint64(PAGE_SHIFT))
        stale: list[int] = code[np.isin(gfns, np.concatenate(written))].tolist()
        return stale

    @property
    def flush_wanted(self) -> bool:
        """Whether the TLB must be flushed before the next block."""
        return self._flush_wanted

    def flushed(self, *, forgotten: bool) -> None:
        """The TLB was flushed; ``forgotten``: and its memory, so that no page is writable through either."""
        self._flush_wanted = False
        if forgotten:
            self._writable.clear()
