"""The source's half of verification (law 7), during pre-copy and at the pause.

Everything with storage is proven equal at the destination before it may run. ``full``: all of it is digested at the
pause, so the proof does not rest on the tracker. ``audit``: what lies still is digested while the guest runs
(:mod:`pageferry.engine.verify.audit`). At the pause the rest is digested, and of the audited pages as many again as
make the pause a quarter longer and fit the downtime limit, those whose proof is oldest first. Where the proof is not to
rest on the tracker, what has storage is looked up at the pause too; otherwise it is what had some at the last look, and
all that the tracker reported since.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import GuestAt, PeerError, VerifyError
from pageferry.core.events import Phase
from pageferry.core.frames import PAGES_PER_2M, GfnArray
from pageferry.core.vm import Vm
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.options import VerifyMode
from pageferry.engine.verify.audit import Auditor, piece_pages
from pageferry.engine.verify.cost import ProofCost
from pageferry.engine.verify.digests import (
    DIGEST_BYTES,
    FRAME_PAGES,
    NO_DIGESTS,
    RunDigests,
    batches,
    different_pages,
    digest_runs,
)
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry_frames import Digests, Failed, Mismatch, Ready
from pageferry.stream.format import MAX_DIGESTS, MAX_RANGE_PAGES

_WAIT_S = 0.05
#: So many pages are looked at from both ends where the memory is one: that it lies alike, not that it is equal.
_LOOKED_AT = 64
#: Digesting at the pause is the default when it is expected to take no more than this share of the downtime limit.
_FULL_SHARE = 0.5
#: How much of the time that the limit leaves is spent on proving audited pages again, for the other end may be slower;
#: and how much of the time that the pause takes in any case, for downtime under the limit is downtime too. The
#: ends digest few pages one after the other, so each has half of it.
_AGAIN_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """What is proven at the pause, and how.

    ``populated`` has storage; of it the frames in ``audited`` are proven already. ``starts``, ``lengths`` and
    ``is_audited``: the runs of both kinds, ascending.
    """

    populated: DirtyBitmap
    audited: DirtyBitmap
    starts: GfnArray
    lengths: GfnArray
    is_audited: NDArray[np.bool_]


class MemoryProof:
    """Proves one migration's memory equal.

    Args:
        vm: the guest.
        accounts: of its pages.
        mode: as in :class:`~pageferry.engine.options.MigrationOptions`.
        limit_s: returns the downtime limit, None where the policy has none.
        now_s: a monotonic clock in seconds.
    """

    def __init__(
        self,
        vm: Vm,
        accounts: PageAccounts,
        mode: VerifyMode | None,
        *,
        limit_s: Callable[[], float | None],
        now_s: Callable[[], float],
    ) -> None:
        self.verified_pages = 0
        """How many pages were proven in all, once they all are."""
        self.audited_pages = 0
        """How many of these were proven during pre-copy and not again at the pause."""
        self._vm = vm
        self._accounts = accounts
        self._mode = mode
        self._limit_s = limit_s
        self._cost = ProofCost(vm.memory, accounts, now_s)
        self._auditor: Auditor | None = None
        self._audits = False
        self._foreseen: _Plan | None = None

    @property
    def may_audit(self) -> bool:
        """Whether to offer audits in the hello."""
        return self._mode is not VerifyMode.FULL

    def agree(self, *, audits: bool) -> None:
        """Take in whether the destination audits.

        Raises:
            PeerError: it does not, and was asked to.
        """
        if audits and self.may_audit:
            memory = self._vm.memory
            self._auditor = Auditor(
                memory, self._accounts, self._vm.log_dirty.peek, piece_pages=piece_pages(memory.gfn_limit)
            )
        elif self._mode is VerifyMode.AUDIT:
            raise PeerError(
                "the destination cannot audit during pre-copy",
                phase=str(Phase.HELLO),
                guest_at=GuestAt.SOURCE,
                hint="--verify full, or a newer pageferry there",
            )

    # -- while the guest runs --------------------------------------------------------------------------------------

    def begin_round(self, dirty: DirtyBitmap) -> None:
        """Measure what a proof takes, and begin to audit if that is what is wanted and needed.

        Args:
            dirty: the bitmap when the last round ended; empty before the first.
        """
        self._cost.measure()
        if self._auditor is not None and not self._audits and self._is_to_audit(dirty):
            self._audits = True
            self._auditor.start()

    def due(self) -> RunDigests | None:
        """Return digests to send now, each behind the pages that it is of; None when there are none."""
        return self._auditor.due() if self._auditor is not None and self._audits else None

    def idle(self) -> bool:
        """Tell whether all is proven that was sent, lies still, and is to be proven while the guest runs."""
        return self._auditor is None or not self._audits or self._auditor.idle()

    def wait(self) -> None:
        """Wait a while for :meth:`due` to have something."""
        if self._auditor is not None:
            self._auditor.wait(_WAIT_S)

    def pause_s(self, dirty: DirtyBitmap) -> float:
        """Return how long proving at a pause now would take.

        Args:
            dirty: the bitmap now; with it, whatever got storage since it was looked up.
        """
        fresh = self._accounts.populated | dirty
        if self._audits:
            fresh -= self._accounts.proven() - dirty
            return (1 + _AGAIN_SHARE) * self._cost.digest_s(fresh.count())
        return self._cost.found_s + self._cost.digest_s(fresh.count())

    def mismatch(self, mismatch: Mismatch, round_index: int) -> PeerError:
        """Return the error for a run that was found to differ while the guest runs, or ran.

        Args:
            mismatch: what the destination says.
            round_index: of the round under way.
        """
        tracker = self._vm.log_dirty.tracker
        gfns = different_pages(self._vm.memory, mismatch.first_gfn, mismatch.page_digests)
        if self._auditor is not None:
            gfns = gfns[self._auditor.proven().test_many(gfns) & ~self._vm.log_dirty.peek().test_many(gfns)]
        why = f"in round {round_index} the destination's memory is not ours, and {tracker} reported no write to it"
        return _failure(why, gfns, Phase.PRECOPY)

    def close(self) -> None:
        """End what runs in the background: the guest is about to be paused, or the migration has failed."""
        if self._auditor is not None:
            self._auditor.close()

    def foresee(self, spent_s: float) -> None:
        """Work out what the pause, which comes next, will have to prove, as if the guest wrote nothing until then.

        Args:
            spent_s: how long the pause is expected to take without the proof.
        """
        if not self._audits:
            return
        self.close()
        dirty = self._vm.log_dirty.peek()
        self._accounts.was_reported = DirtyBitmap(dirty.nbits)
        self._foreseen = self._plan(self._populated() | dirty, spent_s, dirty)

    # -- at the pause ----------------------------------------------------------------------------------------------

    def prove(self, peer: Peer, spent_s: float, missing: DirtyBitmap | None = None) -> None:
        """Prove whatever is not proven.

        Args:
            peer: the stream has passed.
            spent_s: the downtime so far, and what the pause still takes after this proof.
            missing: pages that come after the switch, each with its own digest; they are not proven here.

        Raises:
            PeerError: the destination's memory is not ours.
            RemoteStreamError: it answers something else.
        """
        plan = self._foreseen
        if plan is None or missing is not None or not self._holds(plan):
            populated = self._populated()
            if missing is not None:
                populated -= missing
            plan = self._plan(populated, spent_s)
        starts, lengths, is_audited = plan.starts, plan.lengths, plan.is_audited
        if not starts.size:
            none, pages = NO_DIGESTS, lengths.astype(np.uint32)
            peer.send(Digests(first_gfns=starts, pages=pages, digests=none, audited=is_audited, last=True))
        for piece in batches(np.where(is_audited, 0, lengths), FRAME_PAGES, MAX_DIGESTS):
            fresh = ~is_audited[piece]
            digests = np.zeros((fresh.size, DIGEST_BYTES), np.uint8)
            digests[fresh] = digest_runs(self._vm.memory, starts[piece][fresh], lengths[piece][fresh])
            peer.send(
                Digests(
                    first_gfns=starts[piece],
                    pages=lengths[piece].astype(np.uint32),
                    digests=digests,
                    audited=is_audited[piece],
                    last=piece.stop == starts.size,
                )
            )
        self.audited_pages = plan.audited.count()
        self._expect_ready(peer, int(lengths.sum()))

    def look(self, peer: Peer) -> None:
        """Let the destination look at a few pages, where it has our memory itself; raises as :meth:`prove`."""
        starts, _ = self._vm.memory.populated()
        some = starts[:: -(-starts.size // _LOOKED_AT) or 1]
        pages = np.ones_like(some)
        digests = digest_runs(self._vm.memory, some, pages)
        none = np.zeros(some.size, np.bool_)
        peer.send(Digests(first_gfns=some, pages=pages.astype(np.uint32), digests=digests, audited=none, last=True))
        self._expect_ready(peer, some.size)

    def _is_to_audit(self, dirty: DirtyBitmap) -> bool:
        limit_s = self._limit_s()
        return self._mode is VerifyMode.AUDIT or (limit_s is not None and self.pause_s(dirty) > _FULL_SHARE * limit_s)

    def _expect_ready(self, peer: Peer, pages: int) -> None:
        answer = peer.receive()
        if isinstance(answer, Mismatch):
            raise self._difference(peer, answer)
        if not isinstance(answer, Ready) or answer.verified_pages != pages:
            raise peer.out_of_turn(answer)
        self.verified_pages = pages

    def _populated(self) -> DirtyBitmap:
        if not self._audits:
            self._accounts.found(*self._vm.memory.populated())
            return self._accounts.populated.copy()
        populated = self._accounts.populated.copy()
        populated &= self._vm.memory.all_ram()
        return populated

    def _plan(self, populated: DirtyBitmap, spent_s: float, dirty: DirtyBitmap | None = None) -> _Plan:
        """Return what to do about these frames, of which those that are dirty were not sent as they are."""
        audited = self._not_again(populated if dirty is None else populated - dirty, spent_s)
        starts, lengths, is_audited = _merged(populated - audited, audited)
        return _Plan(populated=populated, audited=audited, starts=starts, lengths=lengths, is_audited=is_audited)

    def _holds(self, plan: _Plan) -> bool:
        """Tell whether a plan is right, after what was reported since: a page more, or one that was proven, is not."""
        reported = self._accounts.was_reported.words
        where = np.flatnonzero(reported)
        wrong = reported[where] & (plan.audited.words[where] | ~plan.populated.words[where])
        return not wrong.any() and not self._vm.memory.removed().size

    def _not_again(self, populated: DirtyBitmap, spent_s: float) -> DirtyBitmap:
        """Return the frames whose audit is proof enough."""
        if self._auditor is None:
            return DirtyBitmap(populated.nbits)
        audited = self._auditor.proven()
        audited &= populated
        limit_s, pages_per_s = self._limit_s(), self._cost.pages_per_s
        if limit_s is None or pages_per_s is None:
            return audited
        spent_s += self._cost.digest_s((populated - audited).count())
        again_s = _AGAIN_SHARE * min(spent_s, limit_s - spent_s)
        return audited - self._auditor.oldest(max(0, int(again_s / 2 * pages_per_s)))

    def _difference(self, peer: Peer, mismatch: Mismatch) -> PeerError:
        gfns = different_pages(self._vm.memory, mismatch.first_gfn, mismatch.page_digests)
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
