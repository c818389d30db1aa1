"""Faults of the engine: its source with pre-copy, and its destination. Each has one part replaced by a faulty one."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from altered import AlteredDestination, AlteredSource

from mutation.fault import Faults, Room
from mutation.tracker_wrapper import Faithful
from pageferry.core.bitmap import DirtyBitmap, expand_runs
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.policy import RoundStats
from pageferry.core.vm import Vm
from pageferry.engine.attempt import Attempt
from pageferry.engine.guest import TrackedGuest
from pageferry.engine.handoff.custody import Handoff, SourceCustody
from pageferry.engine.handoff.take import take
from pageferry.engine.pages.encode import PlainCoder
from pageferry.engine.pages.send import Lanes
from pageferry.engine.precopy import Precopy, Sink, stop_and_copy
from pageferry.engine.verify.compare import Comparison, ReceivedPages
from pageferry.engine.verify.digests import DigestArray
from pageferry.stream.encoder import Encoder

fault = Faults(Room.ENGINE)


class _Instead:
    """An object with some attributes of another one's replaced."""

    def __init__(self, sound: object, **replaced: object) -> None:
        self._sound = sound
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sound, name)


class _CleansLate(Faithful):
    """CLEAN returns the bits and takes them only when told to."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """PEEK, of a range."""
        return self._sound.peek().take(gfns)

    def really_clean(self) -> None:
        """CLEAN."""
        if self._sound.enabled:
            self._sound.clean()


class _CleansWhenSent(Precopy):
    def _send_round(self, chunks: Iterable[GfnArray], expected_pages: int) -> tuple[RoundStats, DirtyBitmap]:
        stats, dirty = super()._send_round(chunks, expected_pages)
        if stats.index:
            late: Any = self._vm.log_dirty
            late.really_clean()
        return stats, dirty


@fault(
    "no bug on record: the two steps of a round the wrong way round",
    law=3,
    found_by=("written-right-after-a-read",),
)
class ReadBeforeClean(AlteredSource, parts={"source.Precopy": _CleansWhenSent}):
    """A round reads the bitmap, sends the pages, and clears the bits when they are sent."""

    def __init__(self, vm: Vm, *args: Any, **options: Any) -> None:
        machine: Any = _Instead(vm, log_dirty=_CleansLate(vm))
        super().__init__(machine, *args, **options)


class _SkipsZeros(Lanes):
    def send(self, gfns: GfnArray, *, fresh: bool) -> None:
        views = self.all[0]._memory.page_views(gfns)
        content = np.array([np.frombuffer(view, np.uint64).any() for view in views], np.bool_)
        super().send(gfns[content], fresh=fresh)


@fault(
    "QEMU: a page that became zero was not sent; zero pages dropped with compressed multi-stream",
    law=2,
    found_by=("a-page-becomes-zero",),
)
class ZeroPagesSkipped(AlteredSource, parts={"source.Lanes": _SkipsZeros}):
    """Pages of zeros are not sent in any round: the destination's memory starts as zeros."""


def unless_nothing_remained(attempt: Attempt, sink: Sink, gfns: GfnArray) -> None:
    """Copy the last pages only if some were left when they were last counted."""
    if attempt.rounds.ended[-1].remaining_pages:
        stop_and_copy(attempt, sink, gfns)


@fault(
    "Xen: the dirty count read 0, so a round was skipped",
    law=2,
    found_by=("written-after-the-last-count",),
)
class FinalRoundSkipped(AlteredSource, parts={"source.stop_and_copy": unless_nothing_remained}):
    """When the last round left nothing dirty, the pause has nothing to copy."""


class _SendsOldPages(PlainCoder):
    def __init__(self, memory: GuestMemory, encoder: Encoder) -> None:
        cache: dict[int, bytes] = {}

        def views(starts: GfnArray, lengths: GfnArray) -> list[bytes]:
            pages = expand_runs(starts, lengths)
            for gfn, view in zip(pages.tolist(), memory.page_views(pages), strict=True):
                cache.setdefault(gfn, bytes(view))
            return [cache[gfn] for gfn in pages.tolist()]

        stale: Any = _Instead(memory, views=views)
        super().__init__(stale, encoder)


@fault(
    "QEMU: compressed a page while the guest was changing it, so what was sent mixed two moments",
    law=3,
    found_by=("written-right-after-a-read",),
)
class StalePageCache(AlteredSource, parts={"source.PlainCoder": _SendsOldPages}):
    """A page that was sent before is sent again from a cache."""


class _LooksBeforeEnable(TrackedGuest):
    def enable(self) -> None:
        self._early = super().populated()
        super().enable()

    def populated(self) -> GfnArray:
        return self._early


@fault(
    "Propolis: pages were missing from the bitmap when it was opened",
    law=3,
    found_by=("touched-just-before-enable",),
)
class SnapshotBeforeEnable(AlteredSource, parts={"attempt.TrackedGuest": _LooksBeforeEnable}):
    """The first round sends what had storage before ENABLE."""


class _LeavesLogDirtyOn(TrackedGuest):
    def release(self) -> None:
        pass


@fault(
    "Propolis: after a failed attempt the next one started with wrong bits",
    law=5,
    found_by=("a-failed-attempt-leaves-no-trace",),
)
class LogDirtyLeftOn(AlteredSource, parts={"attempt.TrackedGuest": _LeavesLogDirtyOn}):
    """A failed attempt does not turn log-dirty off."""


class _StaysFrozen(TrackedGuest):
    def restore(self) -> None:
        super().restore()
        self.vm.freeze()


@fault(
    "no bug on record, many complaints: after a failure the guest ran nowhere",
    law=5,
    found_by=("a-failed-attempt-leaves-no-trace",),
)
class FrozenAfterFailure(AlteredSource, parts={"attempt.TrackedGuest": _StaysFrozen}):
    """A failed attempt leaves the guest frozen."""


class _KeepsBackends(TrackedGuest):
    def release_backends(self) -> None:
        pass


@fault(
    "no bug on record: a lock ends with its process, and so it is kept until two are tried at a time",
    law=6,
    found_by=("a-disk-goes-with-its-guest",),
)
class DiskLockKept(AlteredSource, parts={"attempt.TrackedGuest": _KeepsBackends}):
    """The source keeps its guest's disk when it commits: no destination can take it."""


class _Forgets(TrackedGuest):
    def claim_backends(self) -> None:
        pass


@fault(
    "Cloud Hypervisor: a migration that failed in its last step left the source without its disk locks",
    law=6,
    found_by=("a-disk-comes-back",),
)
class DiskLockLost(AlteredSource, parts={"attempt.TrackedGuest": _Forgets}):
    """After a failure the guest runs on at the source, and its disk is not locked."""


def _keeps(peer: Any, takeover: Any, ready: Any, word: Any, claim: Any, release: Any, *rest: Any) -> None:
    take(peer, takeover, ready, word, claim, lambda: None, *rest)


@fault(
    "this project: a guest that could not be started at the destination stood still at its source for want of its disk",
    law=6,
    found_by=("a-disk-is-given-back-first",),
)
class DiskGivenBackLater(AlteredDestination, parts={"destination.take": _keeps}):
    """A destination that cannot start the guest says so while it still has the guest's disk."""


class _Unmarked(ReceivedPages):
    def __init__(self, memory: GuestMemory, **options: Any) -> None:
        silent: Any = _Instead(memory, wrote=lambda gfns: None)
        super().__init__(silent, **options)


@fault(
    "KVM dirty ring: what is written while no vCPU runs was missed; Cloud Hypervisor: VMM writes untracked",
    law=4,
    found_by=("what-arrives-is-marked",),
)
class RestoreNotMarked(AlteredDestination, parts={"destination.ReceivedPages": _Unmarked}):
    """Pages that arrive are written and not marked."""


class _NeverLooks(Comparison):
    def _difference(self, starts: GfnArray, lengths: GfnArray, theirs: DigestArray) -> None:
        pass


@fault(
    "no bug on record: a proof that proves nothing",
    law=7,
    found_by=("verification-tells",),
)
class DigestsNotCompared(AlteredDestination, parts={"destination.Comparison": _NeverLooks}):
    """The destination answers READY whatever the digests say."""


class _GivesUpAtAnyTime(Handoff):
    def give_up(self) -> bool:
        with self._lock:
            self._custody = SourceCustody.HERE
            self._given_up = True
            return True

    def lost(self) -> None:
        pass


@fault(
    "no bug on record: a timer that knows nothing of the handoff",
    law=6,
    found_by=("a-pause-is-not-given-up-after-the-commit",),
)
class PauseGivenUpLate(AlteredSource, parts={"job.Handoff": _GivesUpAtAnyTime}):
    """A pause that takes too long is given up whatever the destination was told."""


class _ForgetsThatItGaveUp(Handoff):
    @property
    def forbidden(self) -> bool:
        return self._cancelled


@fault(
    "no bug on record: what gave the pause up and what commits do not know of each other",
    law=6,
    found_by=("a-pause-that-is-given-up-leaves-the-guest-here",),
)
class PauseGivenUpUnseen(AlteredSource, parts={"job.Handoff": _ForgetsThatItGaveUp}):
    """Nothing remembers that the pause was given up."""
