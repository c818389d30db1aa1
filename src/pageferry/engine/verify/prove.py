"""Prover: the source's half of verification (law 7), during pre-copy and at the pause.

Everything with storage is proven equal at the destination before it may run. ``full``: all of it is digested at the
pause, so what is proven does not rest on the tracker. ``audit``: what lies still is digested while the guest runs
(:mod:`pageferry.engine.verify.audit`); at the pause only the rest is, and of the audited pages as many again as make
the pause a quarter longer and fit the downtime limit, those first whose proof is oldest. What has storage is looked up
then too, where the proof is not to rest on the tracker; otherwise it is what had some at the last look, and all that
the tracker reported since.
"""

import contextlib
from collections.abc import Callable
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import GuestAt, PeerError, VerifyError
from pageferry.core.events import Phase
from pageferry.core.frames import PAGES_PER_2M, GfnArray
from pageferry.core.vm import Vm
from pageferry.engine import features
from pageferry.engine.estimates import digest_pages_per_s
from pageferry.engine.pages.lanes import Lanes
from pageferry.engine.verify import digests as verify
from pageferry.engine.verify.audit import Auditor
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry import Digests, Failed, Frame, Mismatch, Ready
from pageferry.stream.format import MAX_DIGESTS, MAX_RANGE_PAGES

_WAIT_S = 0.05
#: So many pages are looked at from both ends where the memory is one: that it lies alike, not that it is equal.
_LOOKED_AT = 64
#: Digesting at the pause is the default when it is expected to take no more than this share of the downtime limit.
_FULL_SHARE = 0.5
#: How much of the time that the limit leaves is spent on proving audited pages again, for the other end may be slower;
#: and how much of the time that the pause takes in any case, for downtime under the limit is downtime too.
_AGAIN_SHARE = 0.25
#: How much of its time measuring may take.
_MEASURING_SHARE = 0.05


class VerifyMode(StrEnum):
    """When memory is digested; see this module."""

    FULL = "full"
    AUDIT = "audit"


class Prover:
    """Proves one migration's memory equal.

    Args:
        vm: the guest.
        mode: None: ``full`` where that fits the downtime limit, ``audit`` otherwise.
        limit_s: the downtime limit, None where the policy has none.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, vm: Vm, mode: VerifyMode | None, limit_s: float | None, now_s: Callable[[], float]) -> None:
        self._vm = vm
        self._mode = mode
        self.limit_s = limit_s
        self._now_s = now_s
        self._auditor: Auditor | None = None
        self._audits = False
        self._pages_per_s: float | None = None
        self._populated = DirtyBitmap(vm.memory.gfn_limit)  # as last found, and how long finding it took
        self._found_s = 0.0
        self._measure_at_s = now_s()
        self.verified_pages = 0
        """How many pages were proven in all, once they all are."""
        self.audited_pages = 0
        """How many of these were proven during pre-copy and not again at the pause."""

    @property
    def may_audit(self) -> bool:
        """Whether to offer audits in the hello."""
        return self._mode is not VerifyMode.FULL

    def agree(self, used: tuple[str, ...]) -> None:
        """Take the destination's answer to our offer.

        Raises:
            PeerError: it cannot audit, and was asked to.
        """
        if features.AUDIT in used and self._mode is not VerifyMode.FULL:
            self._auditor = Auditor(self._vm.memory, self._vm.log_dirty.peek)
        elif self._mode is VerifyMode.AUDIT:
            raise PeerError(
                "the destination cannot audit during pre-copy",
                phase=str(Phase.HELLO),
                guest_at=GuestAt.SOURCE,
                hint="--verify full, or a newer pageferry there",
            )

    def close(self) -> None:
        """End what runs in the background; the guest is about to be paused, or the migration has failed."""
        if self._auditor is not None:
            self._auditor.close()

    def cleaned(self, gfns: GfnArray) -> None:
        """A CLEAN returned these frames (uint64[n]), or the last PEEK."""
        self._populated.set(gfns)
        if self._auditor is not None:
            self._auditor.cleaned(gfns)

    def sent(self, gfns: GfnArray) -> None:
        """These frames (uint64[n]) are on the wire; from any thread."""
        if self._auditor is not None:
            self._auditor.sent(gfns)

    def prepare(self) -> None:
        """Measure what a proof takes, and begin to audit if that is what is wanted and needed.

        Call it before every round, for the host's speed may change. It takes up to 20 ms per GiB, in which the guest
        writes, and does nothing where that is much beside the rounds since the last time.
        """
        began_s = self._now_s()
        if began_s < self._measure_at_s:
            return
        self._populated = self._find_populated()  # a page that gets storage from here on is dirty by then
        self._found_s = self._now_s() - began_s
        sample = verify.sample_runs(*self._populated.runs(max_pages=PAGES_PER_2M))
        self._pages_per_s = digest_pages_per_s(self._vm.memory, *sample, self._now_s) or self._pages_per_s
        ended_s = self._now_s()
        self._measure_at_s = ended_s + (ended_s - began_s) / _MEASURING_SHARE
        if self._auditor is None or self._audits:
            return
        limit_s = self.limit_s
        if self._mode is VerifyMode.AUDIT or (limit_s is not None and self.cost_s() > _FULL_SHARE * limit_s):
            self._audits = True
            self._auditor.start()

    def send_due(self, lanes: Lanes) -> None:
        """Send digests that are ready, if any, each behind the pages that it is of."""
        proof = self._auditor.due() if self._auditor is not None and self._audits else None
        if proof is not None:
            lanes.send_proof(proof)

    def catch_up(self, lanes: Lanes, check: Callable[[], None]) -> None:
        """Wait until everything that was sent and lies still is proven.

        Args:
            lanes: to the destination.
            check: called now and then; raises to end it.
        """
        while self._auditor is not None and self._audits and not self._auditor.idle():
            self._auditor.wait(_WAIT_S)
            check()
            self.send_due(lanes)

    def cost_s(self) -> float:
        """Return how long proving at a pause now would take, as :meth:`prepare` found: the guest stands still then."""
        dirty = self._vm.log_dirty.peek()  # and with it whatever got storage since
        fresh = self._populated | dirty
        if self._audits and self._auditor is not None:
            fresh -= self._auditor.proven() - dirty
            return (1 + _AGAIN_SHARE) * self._digest_s(fresh.count())
        return self._found_s + self._digest_s(fresh.count())

    def prove(self, peer: Peer, spent_s: float, missing: DirtyBitmap | None = None) -> Frame | None:
        """Prove at the pause whatever is not proven.

        Args:
            peer: the stream has passed.
            spent_s: how long the guest stands still already, what is still to come besides this included.
            missing: pages that come after the switch, each with its own digest; they are not proven here.

        Returns:
            None when the destination found everything equal; otherwise what it answered.

        Raises:
            PeerError: the destination's memory is not ours.
        """
        if self._audits:
            populated = self._populated
            populated &= self._vm.memory.all_ram()
        else:
            populated = self._find_populated()
        if missing is not None:
            populated -= missing
        audited = self._not_again(populated, spent_s)
        starts, lengths, is_audited = _merged(populated - audited, audited)
        if not starts.size:
            none, pages = verify.NO_DIGESTS, lengths.astype(np.uint32)
            peer.send(Digests(first_gfns=starts, pages=pages, digests=none, audited=is_audited, last=True))
        for piece in verify.batches(np.where(is_audited, 0, lengths), verify.FRAME_PAGES, MAX_DIGESTS):
            fresh = ~is_audited[piece]
            digests = np.zeros((fresh.size, verify.DIGEST_BYTES), np.uint8)
            digests[fresh] = verify.digest_runs(self._vm.memory, starts[piece][fresh], lengths[piece][fresh])
            peer.send(
                Digests(
                    first_gfns=starts[piece],
                    pages=lengths[piece].astype(np.uint32),
                    digests=digests,
                    audited=is_audited[piece],
                    last=piece.stop == starts.size,
                )
            )
        self.audited_pages = audited.count()
        return self._judge(peer, int(lengths.sum()))

    def look(self, peer: Peer) -> Frame | None:
        """Let the destination look at a few pages, where it has our memory itself; otherwise as :meth:`prove`."""
        starts, _ = self._vm.memory.populated()
        some = starts[:: -(-starts.size // _LOOKED_AT) or 1]
        pages = np.ones_like(some)
        digests = verify.digest_runs(self._vm.memory, some, pages)
        none = np.zeros(some.size, np.bool_)
        peer.send(Digests(first_gfns=some, pages=pages.astype(np.uint32), digests=digests, audited=none, last=True))
        return self._judge(peer, some.size)

    def _judge(self, peer: Peer, pages: int) -> Frame | None:
        answer = peer.receive()
        if isinstance(answer, Mismatch):
            raise self._difference(peer, answer)
        if not isinstance(answer, Ready) or answer.verified_pages != pages:
            return answer
        self.verified_pages = pages
        return None

    def mismatch(self, mismatch: Mismatch, round_index: int) -> PeerError:
        """Return the error for a run that was found to differ while the guest runs, or ran.

        Args:
            mismatch: what the destination says.
            round_index: of the round under way.
        """
        tracker = self._vm.log_dirty.tracker
        gfns = verify.different_pages(self._vm.memory, mismatch.first_gfn, mismatch.page_digests)
        if self._auditor is not None:
            gfns = gfns[self._auditor.proven().test_many(gfns) & ~self._vm.log_dirty.peek().test_many(gfns)]
        why = f"in round {round_index} the destination's memory is not ours, and {tracker} reported no write to it"
        return _failure(why, gfns, Phase.PRECOPY)

    def _find_populated(self) -> DirtyBitmap:
        populated = DirtyBitmap(self._vm.memory.gfn_limit)
        populated.set_runs(*self._vm.memory.populated())
        return populated

    def _digest_s(self, pages: int) -> float:
        return pages / self._pages_per_s if self._pages_per_s else 0.0

    def _not_again(self, populated: DirtyBitmap, spent_s: float) -> DirtyBitmap:
        """Return the frames whose audit is proof enough."""
        if self._auditor is None:
            return DirtyBitmap(populated.nbits)
        audited = self._auditor.proven()
        audited &= populated
        if self.limit_s is None or self._pages_per_s is None:
            return audited
        spent_s += self._digest_s((populated - audited).count())
        again_s = _AGAIN_SHARE * min(spent_s, self.limit_s - spent_s)
        return audited - self._auditor.oldest(max(0, int(again_s * self._pages_per_s)))

    def _difference(self, peer: Peer, mismatch: Mismatch) -> PeerError:
        gfns = verify.different_pages(self._vm.memory, mismatch.first_gfn, mismatch.page_digests)
        error = _failure("the destination's memory is not ours", gfns, Phase.VERIFY)
        with contextlib.suppress(OSError):
            peer.send(Failed(reason=error.reason, gfn=_first(gfns)))
        return error


def _first(gfns: GfnArray) -> int | None:
    return int(gfns[0]) if gfns.size else None


def _failure(reason: str, gfns: GfnArray, phase: Phase) -> PeerError:
    cause = VerifyError(reason, gfn=_first(gfns))
    error = PeerError(str(cause), phase=str(phase), guest_at=GuestAt.SOURCE)
    error.__cause__ = cause
    return error


def _merged(fresh: DirtyBitmap, audited: DirtyBitmap) -> tuple[GfnArray, GfnArray, NDArray[np.bool_]]:
    """Return the runs of both, ascending, and which are audited; those to be digested are 2 MiB at the most."""
    fresh_starts, fresh_lengths = fresh.runs(max_pages=PAGES_PER_2M)
    audited_starts, audited_lengths = audited.runs(max_pages=MAX_RANGE_PAGES)
    starts = np.concatenate((fresh_starts, audited_starts))
    order = np.argsort(starts, kind="stable")
    lengths = np.concatenate((fresh_lengths, audited_lengths))
    return starts[order], lengths[order], (np.arange(starts.size) >= fresh_starts.size)[order]
