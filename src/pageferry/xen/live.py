"""What a save and a migration of a domain have in common besides the engine's parts."""

from collections.abc import Sequence

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.events import Phase
from pageferry.core.frames import GfnArray
from pageferry.engine.attempt import Attempt
from pageferry.engine.pages.encode import PageCoder
from pageferry.engine.pages.send import Lane, Lanes, Outlet
from pageferry.engine.precopy import Precopy, stop_and_copy
from pageferry.engine.verify.digests import RunDigests
from pageferry.stream.encoder import Encoder
from pageferry.stream.records import HvmContext, PlainRecord
from pageferry.xen.domain import XenDomain

#: So many frames are named in a warning.
_NAMED = 4


class XenSink:
    """Sends pages to Xen's tools, which do not answer while they come.

    Args:
        domain: whose pages.
        lane: to the tools.
    """

    def __init__(self, domain: XenDomain, lane: Lane) -> None:
        self.lanes = Lanes(lane)
        self._memory = domain.memory
        self._lane = lane

    def begin(self, gfns: GfnArray) -> None:
        """Name the frames below the domain's highest that have no page, as Xen's tools do."""
        holes = DirtyBitmap(self._memory.gfn_limit)
        holes.set_range(0, self._memory.gfn_limit)
        holes -= self._memory.all_ram()
        self._lane.send_removed(holes.gfns())

    def check(self) -> None:
        """Hear nothing."""

    def fence(self, number: int) -> None:
        """Wait for nothing."""


class SecondReading:
    """Proves nothing while the domain runs: all of it is read a second time at the pause, which takes its time.

    Args:
        domain: whose memory.
    """

    def __init__(self, domain: XenDomain) -> None:
        began_s = domain.now_s()
        domain.map_again().close()
        self._pause_s = 2 * (domain.now_s() - began_s)

    def begin_round(self, dirty: DirtyBitmap) -> None:
        """Do nothing."""

    def due(self) -> RunDigests | None:
        """Return nothing."""
        return None

    def idle(self) -> bool:
        """Tell that there is nothing to wait for."""
        return True

    def wait(self) -> None:
        """Wait for nothing."""

    def pause_s(self, dirty: DirtyBitmap) -> float:
        """Return how long it may take: to map the domain took half of that."""
        return self._pause_s

    def close(self) -> None:
        """End nothing."""


def copy_and_suspend(
    attempt: Attempt, domain: XenDomain, outlet: Outlet, encoder: Encoder, coder: PageCoder
) -> Sequence[PlainRecord]:
    """Copy a running domain round by round, suspend it, and copy what is left; return the last records of its stream.

    What its log has missed is still to be sent, before these.

    Raises:
        VmError: its guest does not suspend itself; it runs on.
        PolicyAbort: the policy gives up, it was cancelled, or the domain has ended.
        OSError: cut or stalled, or the disk is full.
    """
    phase = attempt.clock.phase
    with attempt.precopy():
        attempt.expect_alive()
        lane = Lane(
            domain.memory,
            outlet,
            encoder,
            coder,
            says_zero=False,
            begins_zero=False,
            on_sent=attempt.accounts.sent,
        )
        sink = XenSink(domain, lane)
        attempt.report.stop_reason = Precopy(attempt, sink, SecondReading(domain)).run().reason
    with phase(Phase.PAUSE):
        suspend(attempt, domain)
    with phase(Phase.STOP_AND_COPY):
        dirty = domain.log_dirty.peek_final()
        attempt.accounts.reported(dirty)
        stop_and_copy(attempt, sink, dirty.gfns())
    with phase(Phase.STATE):
        records = domain.last_records()
        attempt.guest.state_bytes = sum(len(each.data) for each in records if isinstance(each, HvmContext))
    return records


def suspend(attempt: Attempt, domain: XenDomain) -> None:
    """Suspend the domain: pre-copy is over, and the pause's budget runs.

    Raises:
        VmError: its guest does not do what it is asked; it runs on.
        PolicyAbort: it has ended.
    """
    attempt.throttle.close()  # or it would take the freeze that suspends
    domain.suspends = True
    try:
        attempt.stop_guest()
    finally:
        domain.suspends = False


def missed_in_words(missed: GfnArray, done: str) -> str:
    """Return one line on pages (uint64[n]) that Xen's log missed, and were ``done`` at the pause."""
    some = ", ".join(f"{gfn:#x}" for gfn in missed[:_NAMED].tolist())
    more = ", ..." if missed.size > _NAMED else ""
    return f"Xen's log missed {missed.size} page(s), {done} at the pause: gfn {some}{more}"
