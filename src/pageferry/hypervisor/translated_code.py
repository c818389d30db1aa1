"""Code that changes: which pages the emulator has translated code of, and which may be written through its TLB.

The emulator sees the first store through a TLB entry to a page from which it has translated code, and forgets what that
store hits. Later stores, through this entry or another gva of the page, it misses: a kernel that compiles a filter over
a freed one would run into the old one. So no page is writable in the TLB of a vCPU while any vCPU has translated code
of it::

    fetch                           never with WRITE; refused while the page may be writable in a TLB
    read, write                     without EXECUTE: the first fetch comes here too
    read of a page with code        without WRITE: the first store comes here too
    write to a page with code       refused

An access that is refused stops its vCPU at that instruction. Outside the guest it asks those in the way to give the
page up, of which it may be one itself; they do so outside the guest, and then the access is made again::

    A: fetch of a page, writable in B's TLB -> refused
    A: outside; asks B ----------------------> B: stopped before its next block; gives the page up
    A: enters again, same access: allowed      B: flushes its TLB and enters; its next store to the page is refused

A vCPU outside the guest is not waited for: it flushes and forgets before it enters. An instruction that writes to the
page that it is in, or to code that follows it, needs both: it is *stepped* over alone, with all rights to that page,
and the page given up behind it.

What devices, the host and the processor itself write is not refused: all code of the page is forgotten afterwards.
"""

import threading
from collections.abc import Callable

import numpy as np

from pageferry.core.frames import PAGE_SHIFT
from pageferry.hypervisor import unicorn_api as api
from pageferry.hypervisor.machine_memory import MachineMemory
from pageferry.hypervisor.paging import Tlb
from pageferry.hypervisor.tlb_memory import TlbMemory

#: How often a vCPU that waits for others looks whether it is to stop itself.
_LOOK_S = 0.001


class CodeSharing:
    """The vCPUs of one domain, for each other's sake; ``changed`` is its lock, told when one gives pages up."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.members: list[TranslatedCode] = []


class TranslatedCode:
    """The pages of one vCPU, by machine address.

    Args:
        machine: machine memory.
        tlb: the vCPU's, which collects what was written behind its back.
        tlb_memory: of the same TLB.
        sharing: the domain's; this object joins it.
        hurry: stops the vCPU before its next block of code.
    """

    def __init__(
        self,
        machine: MachineMemory,
        tlb: Tlb,
        tlb_memory: TlbMemory,
        sharing: CodeSharing,
        hurry: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._tlb = tlb
        self._tlb_memory = tlb_memory
        self._sharing = sharing
        self._hurry = hurry
        self._code: set[int] = set()
        self._writable: set[int] = set()  # may be writable in the TLB
        self._overwritten: list[int] = []  # pages given up, to be forgotten before the guest is entered
        self._inside = False
        self._asked: list[int] = []  # what others want, once outside
        self._refused: tuple[int, bool] | None = None  # a page, and whether it was a fetch
        self._stepped: int | None = None  # a page
        with sharing.changed:
            sharing.members.append(self)

    def clear(self) -> None:
        """Begin with a fresh emulator, which has translated nothing."""
        with self._sharing.changed:
            self._code.clear()
            self._writable.clear()
            self._overwritten.clear()
        self._refused = self._stepped = None
        self._tlb.holds_code = False
        self._tlb.written.clear()

    def permit(self, maddr: int, permissions: int, *, write: bool, fetch: bool) -> int | None:
        """Return what of ``permissions`` the TLB may be told for an access to a page; None: it is refused."""
        if maddr == self._stepped:
            return permissions
        if fetch:
            if maddr not in self._code and not self._may(maddr, fetch=True):
                return None
            self._tlb.holds_code = True
            return permissions & ~api.WRITE
        if maddr in self._code:
            if not write:
                return permissions & ~api.WRITE
            self._refused = maddr, False
            return None
        permissions &= ~api.EXECUTE
        if permissions & api.WRITE and maddr not in self._writable and not self._may(maddr, fetch=False):
            return None if write else permissions & ~api.WRITE
        return permissions

    def _may(self, maddr: int, *, fetch: bool) -> bool:
        """Note that a page has code, or may be writable, from now on; False: a vCPU is in the way."""
        with self._sharing.changed:
            if self._in_the_way(maddr, fetch=fetch):
                self._refused = maddr, fetch
                return False
            (self._code if fetch else self._writable).add(maddr)
            return True

    def _in_the_way(self, maddr: int, *, fetch: bool) -> "list[TranslatedCode]":
        return [each for each in self._sharing.members if maddr in (each._writable if fetch else each._code)]

    # --- entering and leaving the guest ---

    def enter(self) -> bool:
        """Note that the vCPU enters the guest; False: not before what was given up is flushed and forgotten."""
        with self._sharing.changed:
            self._refused = None
            self._inside = not self._overwritten
            return self._inside

    def leave(self) -> None:
        """Note that it is outside, and give up what others have asked for, and what was stepped over."""
        with self._sharing.changed:
            self._inside = False
            if self._stepped is not None:
                self._asked.append(self._stepped)
                self._stepped = None
            if self._asked:
                for maddr in self._asked:
                    self._give_up(maddr)
                self._asked.clear()
                self._sharing.changed.notify_all()

    def _give_up(self, maddr: int) -> None:
        self._code.discard(maddr)
        self._writable.discard(maddr)
        self._overwritten.append(maddr)

    def _ask(self, maddr: int) -> None:
        if self._inside:
            self._asked.append(maddr)
            self._hurry()
        else:
            self._give_up(maddr)

    @property
    def refused(self) -> bool:
        """Whether an access was refused, for which it has stopped."""
        return self._refused is not None

    @property
    def stepping(self) -> bool:
        """Whether one instruction is to be executed alone now."""
        return self._stepped is not None

    def make_way(self, runs_from: Callable[[int], bool], kicked: Callable[[], bool]) -> None:
        """Have all give up the page of the access that was refused, so that it may be made; the vCPU is outside.

        Args:
            runs_from: tells whether the instruction is in a page.
            kicked: whether to give up waiting: the access will be refused again.
        """
        assert self._refused is not None
        maddr, fetch = self._refused
        step = not fetch and runs_from(maddr)
        with self._sharing.changed:
            while in_the_way := self._against(maddr, fetch, step):
                for each in in_the_way:
                    each._ask(maddr)
                if kicked():
                    return
                if any(each._inside for each in in_the_way):
                    self._sharing.changed.wait(_LOOK_S)
            if step:
                self._stepped = maddr
                self._code.add(maddr)
                self._writable.add(maddr)

    def _against(self, maddr: int, fetch: bool, step: bool) -> "list[TranslatedCode]":
        if not step:
            return self._in_the_way(maddr, fetch=fetch)
        either = self._in_the_way(maddr, fetch=True) + self._in_the_way(maddr, fetch=False)
        return [each for each in either if each is not self]

    def note_written(self, maddr: int) -> None:
        """Have all code of a page forgotten, which the processor itself has written; the vCPU is outside."""
        if any(maddr in each._code for each in self._sharing.members):
            with self._sharing.changed:
                for each in self._in_the_way(maddr, fetch=False):
                    each._ask(maddr)

    # --- before the guest is entered ---

    def take_written(self) -> list[int]:
        """Return the pages whose code is to be forgotten now: they hold none any more; the TLB is to be flushed."""
        if not (self._overwritten or self._tlb.written):
            return []
        with self._sharing.changed:
            stale, self._overwritten = self._overwritten, []
        stale += self._written_by_others()
        for maddr in stale:
            self._tlb_memory.forget_page(maddr)
        self._code.difference_update(stale)
        return stale

    def _written_by_others(self) -> list[int]:
        written = []
        while self._tlb.written:
            written.append(self._tlb.written.popleft())
        if not written:
            return []
        with self._sharing.changed:
            code = np.fromiter(self._code, np.uint64, len(self._code))
        gfns = self._machine.m2p.gfns(code >> np.uint64(PAGE_SHIFT))
        stale: list[int] = code[np.isin(gfns, np.concatenate(written))].tolist()
        return stale

    def flushed(self) -> None:
        """The TLB was flushed and its memory forgotten, so that no page is writable through either."""
        self._writable.clear()
