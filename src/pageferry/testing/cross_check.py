"""CrossCheck: the tracker oracle. Two trackers on one guest, or one and the guest's content, compared at each CLEAN.

How a lost dirty bit is found while it matters: CLEAN and PEEK fail with the page, the round and who lost it, so the
migration that asked fails closed and the guest stays at the source.

**What is a loss.** That only one of two trackers reports a page is no loss yet: KVM may report a page that was only
read when it was mapped, or that the processor walked. Content decides. A page is read after each CLEAN that reported it
(against ``digests``: all pages with storage are), and its digest is compared with the reading before. If it differs,
somebody wrote the page between the two readings, and *every* tracker must report it. That is the whole rule: when the
trackers were cleaned, relative to each other, does not matter. Reported and not changed is *spurious*: counted only.

**When it must be reported** (laws 2 and 4)::

    tracker T       oracle                        a write w that the reading d[n] shows and d[n-1] did not
    CLEAN t[n-1]
    .               reading d[n-1]
    .               .                             w before t[n] begins: in t[n]. T reported it: settled.
    CLEAN t[n]      .                             w during t[n]: in t[n] or t[n+1], whichever T likes.
    .               .                             w after t[n]: in t[n+1].
    .               reading d[n]: changed.
    .               Not in t[n]: T *owes* the page.
    CLEAN t[n+1]    .                             begun after d[n], so after w: the page is in it, or T has lost it.

Both trackers are cleaned, one after the other, before the reading; so this holds for each by itself. A page that
neither reports is not read by the oracle of two trackers, and found by ``digests`` alone.

**Writers that mark.** A device's bytes land before its mark, and its thread may rest in between for any time. So a page
that is owed becomes *due* only at an instant with no write under way (``GuestMemory.unmarked_writes``): whatever a
reading before it saw has been marked by then. A kernel that writes guest memory itself is taken to mark within a round.

**At the end** the guest stands still, and what a PEEK shows is all that is left: pages are read after it, and each that
changed since its last reading must be in the PEEK (in a second one, taken after the reading, before it is called a
loss). Nothing is owed any more then.

**What is not decided.** A write between t[n] and d[n], to a page that t[n] reported, shows in d[n] and is settled by
t[n]: it may be the write that t[n] reported. Lost, it is found by the next change of the page, or by nobody. The same
is true of a change that is undone before the next reading, and of bytes written over themselves.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, OracleError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import LogDirty, LogDirtyStats
from pageferry.testing.contents import Contents

#: The witness that is no tracker.
DIGESTS = "digests"


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleCounts:
    """What was compared since ENABLE; kept after OFF.

    ``rounds``: rounds of CLEAN, and PEEKs of a guest that stood still. ``pages``: reported by either, over all rounds.
    ``spurious_primary``, ``spurious_witness``: reported by that one only, and not changed.
    """

    rounds: int = 0
    pages: int = 0
    spurious_primary: int = 0
    spurious_witness: int = 0


class _Debts:
    """The pages that one tracker must still report. ``due`` is the part of ``owed`` that its next CLEAN must have."""

    def __init__(self, log: LogDirty, nbits: int) -> None:
        self.log = log
        self.owed = DirtyBitmap(nbits)
        self.due = DirtyBitmap(nbits)

    def mature(self, removed: GfnArray) -> None:
        """No write is under way: all that is owed is due, but for frames that are no RAM any more."""
        if removed.size:
            self.owed.clear(removed)
        self.due = self.owed.copy()

    def overdue(self, reported: DirtyBitmap, gfns: range) -> DirtyBitmap:
        """Return what a CLEAN of ``gfns`` should have reported and did not."""
        return self.due.copy().take(gfns) - reported

    def settle(self, reported: DirtyBitmap, changed: DirtyBitmap) -> None:
        """Take note of a CLEAN, and of what was found changed after it."""
        self.owed |= changed
        self.owed -= reported
        self.due -= reported


class CrossCheck:
    """A tracker with a witness beside it; implements :class:`pageferry.core.vm.LogDirty`.

    What it returns is the primary's. CLEAN and PEEK raise OracleError on a loss; no bit was cleared then.

    Args:
        primary: the tracker under test.
        witness: a second one on the same guest, or None: page digests alone.
        memory: the guest's.
        still: tells whether every vCPU is outside the guest and its last I/O done.
    """

    def __init__(
        self, primary: LogDirty, witness: LogDirty | None, memory: GuestMemory, *, still: Callable[[], bool]
    ) -> None:
        self._primary = primary
        self._witness = witness
        self._memory = memory
        self._still = still
        self._operator = threading.Lock()  # one operator at a time; never taken by a mark
        self._counts = OracleCounts()
        self._reset()

    def _reset(self) -> None:
        nbits = self._memory.gfn_limit
        self._contents: Contents | None = None  # None: log-dirty is off
        self._debts = tuple(_Debts(log, nbits) for log in self._logs)
        self._changed_in = np.zeros(nbits, np.uint32)  # the round in which a page was last seen to change
        self._round = -1
        self._next_gfn = 0  # where a CLEAN begins that goes on with the round
        self._witnessed_before = DirtyBitmap(nbits)
        self._witness_only = DirtyBitmap(nbits)

    @property
    def _logs(self) -> tuple[LogDirty, ...]:
        return (self._primary,) if self._witness is None else (self._primary, self._witness)

    @property
    def tracker(self) -> str:
        """Both names."""
        return f"{self._primary.tracker} against {DIGESTS if self._witness is None else self._witness.tracker}"

    @property
    def enabled(self) -> bool:
        """Whether log-dirty is on."""
        return self._primary.enabled

    def counts(self) -> OracleCounts:
        """Return what was compared since ENABLE, also after OFF."""
        return self._counts

    def enable(self) -> None:
        """ENABLE both, then read every page with storage. On failure both are off.

        Raises:
            LogDirtyError: log-dirty is on already; nothing changed.
            VmError: one of them cannot.
        """
        with self._operator, ExitStack() as undo:
            if self.enabled:
                raise LogDirtyError("log-dirty is on already")
            for log in self._logs:
                log.enable()
                undo.callback(log.off)
            self._reset()
            self._counts = OracleCounts()
            contents = Contents(self._memory)
            contents.changed(self._memory.all_ram(), keep=True)
            self._contents = contents
            undo.pop_all()

    def off(self) -> None:
        """OFF for both, the second also when the first failed."""
        with self._operator, ExitStack() as each:
            self._reset()
            for log in self._logs:
                each.callback(log.off)

    def close(self) -> None:
        """Close both, as far as they can be."""
        with ExitStack() as each:
            for log in self._logs:
                if (close := getattr(log, "close", None)) is not None:
                    each.callback(close)

    def mark(self, gfns: GfnArray) -> None:
        """Mark frames with both."""
        for log in self._logs:
            log.mark(gfns)

    def stats(self) -> LogDirtyStats:
        """Return the primary's counters."""
        return self._primary.stats()

    def give_back(self, bitmap: DirtyBitmap) -> None:
        """Give bits back to both, which must report them again, changed or not.

        Raises:
            LogDirtyError: log-dirty is off.
        """
        with self._operator:
            for log in self._logs:
                log.give_back(bitmap)
            ram = self._memory.all_ram()
            ram &= bitmap
            self._note_changed(ram, self._round)
            for debts in self._debts:
                debts.owed |= ram

    def clean(self) -> DirtyBitmap:
        """CLEAN both, compare, and return what the primary reported.

        Raises:
            OracleError: one of them lost a page; no bit was cleared.
            LogDirtyError: as the trackers' own.
        """
        return self.clean_range(range(self._memory.gfn_limit))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of these frames only; ranges that ascend are one round.

        Raises:
            OracleError: as :meth:`clean`.
            LogDirtyError: as :meth:`clean`.
            ValueError: the range does not consist of whole words of the bitmap; no bit was cleared.
        """
        with self._operator:
            if self._memory.unmarked_writes == 0:
                self._mature()
            reports: list[DirtyBitmap] = []
            try:
                for log in self._logs:
                    reports.append(log.clean_range(gfns))  # noqa: PERF401  # what comes before a failure is kept
                contents = self._expect_on()
                for debts, reported in zip(self._debts, reports, strict=True):
                    self._expect_none(debts, debts.overdue(reported, gfns))
                changed = contents.changed(self._to_read(reports, gfns), keep=True)
            except BaseException:
                for log, reported in zip(self._logs, reports, strict=False):  # as far as it came
                    log.give_back(reported)
                raise
            self._settle(reports, changed, gfns, new_round=gfns.start < self._next_gfn or self._round < 0)
            self._next_gfn = max(gfns.stop, gfns.start + 1)
            return reports[0]

    def peek(self) -> DirtyBitmap:
        """PEEK at the primary; of a guest that stands still, compare.

        Raises:
            OracleError: one of them lost a page.
            LogDirtyError: as the trackers' own.
        """
        with self._operator:
            if not self._still() or self._memory.unmarked_writes:
                return self._primary.peek()
            self._mature()
            reports = [log.peek() for log in self._logs]
            everything = range(self._memory.gfn_limit)
            changed = self._expect_on().changed(self._to_read(reports, everything), keep=False)
            self._note_changed(changed, self._round + 1)
            for debts, reported in zip(self._debts, reports, strict=True):
                missing = (debts.due | changed) - reported
                if missing.any():
                    self._expect_none(debts, missing - debts.log.peek())
            self._count(reports, changed, everything, new_round=True)
            return reports[0]

    def _expect_on(self) -> Contents:
        if self._contents is None:
            raise LogDirtyError("log-dirty is off")
        return self._contents

    def _mature(self) -> None:
        removed = self._memory.removed()
        for debts in self._debts:
            debts.mature(removed)

    def _to_read(self, reports: list[DirtyBitmap], gfns: range) -> DirtyBitmap:
        if self._witness is None:
            return self._memory.all_ram().take(gfns)
        return reports[0] | reports[1]

    def _expect_none(self, debts: _Debts, lost: DirtyBitmap) -> None:
        if not lost.any():
            return
        gfns = lost.gfns().tolist()
        others = [other for other in self._debts if other is not debts and not other.owed.test(gfns[0])]
        raise OracleError(
            gfns,
            round_index=int(self._changed_in[gfns[0]]),
            lost_by=debts.log.tracker,
            seen_by=others[0].log.tracker if others else DIGESTS,
        )

    def _note_changed(self, changed: DirtyBitmap, round_index: int) -> None:
        self._changed_in[changed.gfns()] = max(0, round_index)

    def _settle(self, reports: list[DirtyBitmap], changed: DirtyBitmap, gfns: range, *, new_round: bool) -> None:
        self._round += new_round
        self._note_changed(changed, self._round)
        for debts, reported in zip(self._debts, reports, strict=True):
            debts.settle(reported, changed)
        self._count(reports, changed, gfns, new_round=new_round)

    def _count(self, reports: list[DirtyBitmap], changed: DirtyBitmap, gfns: range, *, new_round: bool) -> None:
        # The primary is cleaned first: what it alone reports, the witness may have reported the CLEAN before; what the
        # witness alone reports, the primary may report the next time. Only then nobody else has seen it.
        primary, witness = reports[0], reports[-1] if self._witness is not None else changed
        witnessed_before, witness_only = self._witnessed_before.take(gfns), self._witness_only.take(gfns)
        counts = self._counts
        self._counts = OracleCounts(
            rounds=counts.rounds + new_round,
            pages=counts.pages + (primary | witness).count(),
            spurious_primary=counts.spurious_primary + (primary - witness - witnessed_before - changed).count(),
            spurious_witness=counts.spurious_witness + (witness_only - primary).count(),
        )
        self._witnessed_before |= witness
        self._witness_only |= witness - primary - changed
