"""CrossCheck: a tracker and its witness, compared at each CLEAN.

Both are cleaned, one after the other, and then pages are read: those that either reported or, where the witness is
``digests``, all that have storage. The :mod:`.ledger` compares what was reported with what changed. A loss fails CLEAN
or PEEK with the page, the round and the tracker, so the migration fails and the guest stays at the source.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import LogDirty, LogDirtyStats
from pageferry.witness import DIGESTS
from pageferry.witness.contents import Contents
from pageferry.witness.ledger import Ledger, WitnessCounts


def findings(log: LogDirty) -> dict[str, Any] | None:
    """Return what a tracker and its witness compared, as JSON-ready values; None: it has no witness."""
    return {"trackers": log.tracker, **asdict(log.counts())} if isinstance(log, CrossCheck) else None


class CrossCheck:
    """A tracker with a witness beside it; implements :class:`pageferry.core.vm.LogDirty`.

    What it returns is the primary's. CLEAN and PEEK raise LostPageError on a loss; no bit was cleared then.

    Args:
        primary: the tracker under test.
        witness: a second one on the same guest; None: page digests.
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
        self._contents: Contents | None = None  # None: log-dirty is off
        self._ledger = self._new_ledger()  # kept after OFF

    def _new_ledger(self) -> Ledger:
        return Ledger([log.tracker for log in self._logs], self._memory.gfn_limit)

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

    def counts(self) -> WitnessCounts:
        """Return what was compared since ENABLE, also after OFF."""
        return self._ledger.counts

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
            self._ledger = self._new_ledger()
            contents = Contents(self._memory)
            contents.changed(self._memory.all_ram(), keep=True)
            self._contents = contents
            undo.pop_all()

    def off(self) -> None:
        """OFF for both, the second also when the first failed."""
        with self._operator, ExitStack() as each:
            self._contents = None
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

    def clean(self) -> DirtyBitmap:
        """CLEAN both, compare, and return what the primary reported.

        Raises:
            LostPageError: one of them lost a page; no bit was cleared.
            LogDirtyError: as the trackers' own.
        """
        return self.clean_range(range(self._memory.gfn_limit))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of these frames only; ranges that ascend are one round.

        Raises:
            LostPageError: as :meth:`clean`.
            LogDirtyError: as :meth:`clean`.
            ValueError: the range does not consist of whole words of the bitmap; no bit was cleared.
        """
        with self._operator:
            if not self._under_way():
                self._ledger.mature(self._memory.removed())
            reports: list[DirtyBitmap] = []
            try:
                for log in self._logs:
                    reports.append(log.clean_range(gfns))  # noqa: PERF401  # what comes before a failure is kept
                contents = self._expect_on()
                self._ledger.expect_due(reports, gfns)
                changed = contents.changed(self._to_read(reports, gfns), keep=True)
            except BaseException:
                for log, reported in zip(self._logs, reports, strict=False):  # as far as it came
                    log.mark(reported.gfns())
                raise
            self._ledger.settle(reports, changed, gfns)
            return reports[0]

    def peek(self) -> DirtyBitmap:
        """PEEK at the primary; of a guest that stands still, and that no device writes meanwhile, compare.

        Raises:
            LostPageError: one of them lost a page.
            LogDirtyError: as the trackers' own.
        """
        with self._operator:
            if not self._still() or self._under_way():
                return self._primary.peek()
            self._ledger.mature(self._memory.removed())
            reports = [log.peek() for log in self._logs]
            to_read = self._to_read(reports, range(self._memory.gfn_limit))
            changed = self._expect_on().changed(to_read, keep=False)
            if self._under_way():  # and read above; the mark of it is yet to come
                return reports[0]
            self._ledger.settle_last(reports, changed, [log.peek for log in self._logs])
            return reports[0]

    def _under_way(self) -> bool:
        """Tell whether a writer other than a vCPU is writing."""
        return self._memory.unmarked_writes > 0

    def _expect_on(self) -> Contents:
        if self._contents is None:
            raise LogDirtyError("log-dirty is off")
        return self._contents

    def _to_read(self, reports: list[DirtyBitmap], gfns: range) -> DirtyBitmap:
        if self._witness is None:
            return self._memory.all_ram().take(gfns)
        return reports[0] | reports[1]
