"""Conformance checks of what counts as a write: every one, whatever the values; and the guest that writes so.

A tracker that looks at what pages hold, and not at who writes them, misses these.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SIZE
from pageferry.guests.abi import PROGRAM_BASE
from pageferry.guests.elf import LoadSegment, Program
from pageferry.testing.lab import Copy, Guest, Lab, listed, require

_PAGES = 4
_TURN, _STORE_THE_SAME = 1, 2

_CODE = bytes.fromhex(
    "4c8b4720"  # mov r8, [rdi+0x20]: the working set
    "4c8b4f28 4d01c1"  # mov r9, [rdi+0x28]; add r9, r8: its end
    "4c89c6 48ba157c4a7fb979379e 31c0"  # mov rsi, r8; mov rdx, 0x9e3779b97f4a7c15; xor eax, eax
    "4801d0 488906 4883c608 4c39ce 72f1"  # fill: add rax, rdx; mov [rsi], rax; add rsi, 8; cmp rsi, r9; jb fill
    "31c0"  # xor eax, eax
    "e7ec e5ec"  # meet: out SYNC, eax; in eax, SYNC
    "4c89c6"  # mov rsi, r8
    "488dbef80f0000 4989f2"  # page: lea rdi, [rsi+4088]; mov r10, rsi
    "83f801 7519"  # cmp eax, 1; jne same
    "488b0e 488b17 488916 48890f"  # turn: mov rcx, [rsi]; mov rdx, [rdi]; mov [rsi], rdx; mov [rdi], rcx
    "4883c608 4883ef08 4839fe 72e7"  # add rsi, 8; sub rdi, 8; cmp rsi, rdi; jb turn
    "498b0a 49890a"  # same: mov rcx, [r10]; mov [r10], rcx
    "498db200100000 4c39ce 72c6"  # lea rsi, [r10+4096]; cmp rsi, r9; jb page
    "ebbd"  # jmp meet
)
_TURNING = Program(
    name="turn",
    entry=PROGRAM_BASE,
    segments=(LoadSegment(gpa=PROGRAM_BASE, data=_CODE, size_bytes=len(_CODE), writable=False),),
    end_gpa=PROGRAM_BASE + PAGE_SIZE,
)
"""Fills its working set, no two words of a page alike. At each sync point it is told what to do with each page: 1, turn
its words around, the last first, so that twice gives what was; anything, store its first word once more."""


@contextmanager
def _tracked(lab: Lab) -> Iterator[Guest]:
    with lab.guest(_TURNING, pages=_PAGES) as guest:
        guest.start_stamping()
        guest.log_dirty.enable()
        yield guest


def _require_all(guest: Guest, reported: DirtyBitmap, what: str) -> None:
    missing = guest.oracle.gfns[~reported.test_many(guest.oracle.gfns)]
    require(not missing.size, f"{what} and not reported: {listed(missing)}")


def permuted_words_are_reported(lab: Lab) -> None:
    """A page whose words only changed places is reported."""
    with _tracked(lab) as guest:
        for _ in range(2):
            guest.answer(_TURN)
            _require_all(guest, guest.log_dirty.clean(), "the words of a page changed places")


def changed_back_is_reported(lab: Lab) -> None:
    """A page that changed and changed back between two CLEANs is reported: a copy may hold what it was meanwhile.

    ::

    guest           migration
    .               clean(): p is in the bitmap
    writes B to p   .
    .               copies p: B
    writes A to p   .
    .               clean(): p holds what it held at the last one; the copy does not
    """
    with _tracked(lab) as guest:
        copy = Copy(guest.memory)
        copy.take_all()
        guest.answer(_TURN)
        reported = guest.log_dirty.clean()
        guest.answer(_TURN)
        copy.take(reported)
        guest.answer(_TURN)
        reported = guest.log_dirty.clean()
        _require_all(guest, reported, "a page changed and changed back")
        copy.take(reported)
        copy.require_equal()


def equal_value_is_reported(lab: Lab) -> None:
    """A store of the value that is there already is a write."""
    with _tracked(lab) as guest:
        guest.answer(_TURN)
        guest.log_dirty.clean()
        guest.answer(_STORE_THE_SAME)
        _require_all(guest, guest.log_dirty.clean(), "a value was stored where it was already")
