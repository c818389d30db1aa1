"""Faults of the engine: source.py (with attempt.py) and destination.py. Each is a class derived from the sound one."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from mutation.altered import Altered
from mutation.fault import Faults, Room
from mutation.mutant import Faithful
from pageferry.core.bitmap import DirtyBitmap, expand_runs
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.policy import RoundStats
from pageferry.core.vm import Vm
from pageferry.engine.source import Source
from pageferry.engine.verify.compare import Comparison, ReceivedPages
from pageferry.engine.verify.digests import Digests

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


@fault(
    "no bug on record: the two steps of a round the wrong way round",
    law=3,
    found_by=("written-right-after-a-read",),
)
class ReadBeforeClean(Source):
    """A round reads the bitmap, sends the pages, and clears the bits when they are sent."""

    def __init__(self, vm: Vm, *args: Any, **options: Any) -> None:
        self._late = _CleansLate(vm)
        machine: Any = _Instead(vm, log_dirty=self._late)
        super().__init__(machine, *args, **options)

    def _send_round(self, chunks: Iterable[GfnArray], **options: Any) -> RoundStats:
        stats = super()._send_round(chunks, **options)
        if stats.index:
            self._late.really_clean()
        return stats


@fault(
    "QEMU: a page that became zero was not sent; zero pages dropped with compressed multi-stream",
    law=2,
    found_by=("a-page-becomes-zero",),
)
class ZeroPagesSkipped(Source):
    """Pages of zeros are not sent in any round: the destination's memory starts as zeros."""

    def _send_round(self, chunks: Iterable[GfnArray], **options: Any) -> RoundStats:
        return super()._send_round(map(self._not_zero, chunks), **options)

    def _not_zero(self, gfns: GfnArray) -> GfnArray:
        views = self._vm.memory.page_views(gfns)
        return gfns[np.array([np.frombuffer(view, np.uint64).any() for view in views], np.bool_)]


@fault(
    "Xen: the dirty count read 0, so a round was skipped",
    law=2,
    found_by=("written-after-the-last-count",),
)
class FinalRoundSkipped(Source):
    """When the last round left nothing dirty, the pause has nothing to copy."""

    def _stop_and_copy(self) -> None:
        if self._sender.rounds[-1].remaining_pages:
            super()._stop_and_copy()


@fault(
    "QEMU: compressed a page while the guest was changing it, so what was sent was of no one moment",
    law=3,
    found_by=("written-right-after-a-read",),
)
class StalePageCache(Source):
    """A page that was sent before is sent again from a cache."""

    _cache: dict[int, bytes] | None = None

    def _send_round(self, chunks: Iterable[GfnArray], **options: Any) -> RoundStats:
        memory = self._vm.memory
        cache = self._cache = {} if self._cache is None else self._cache

        def views(starts: GfnArray, lengths: GfnArray) -> list[bytes]:
            pages = expand_runs(starts, lengths)
            for gfn, view in zip(pages.tolist(), memory.page_views(pages), strict=True):
                cache.setdefault(gfn, bytes(view))
            return [cache[gfn] for gfn in pages.tolist()]

        stale: Any = _Instead(memory, views=views)
        self._lanes._main._coder._memory = stale  # type: ignore[attr-defined]  # the plain one
        return super()._send_round(chunks, **options)


@fault(
    "Propolis: pages were missing from the bitmap when it was opened",
    law=3,
    found_by=("touched-just-before-enable",),
)
class SnapshotBeforeEnable(Source):
    """The first round sends what had storage before ENABLE."""

    def _enable(self) -> GfnArray:
        early = expand_runs(*self._vm.memory.populated())
        super()._enable()
        return early


@fault(
    "Propolis: after a failed attempt the next one started with wrong bits",
    law=5,
    found_by=("a-failed-attempt-leaves-no-trace",),
)
class LogDirtyLeftOn(Source):
    """A failed attempt does not turn log-dirty off."""

    def _disarm(self) -> None:
        pass


@fault(
    "no bug on record, many complaints: after a failure the guest ran nowhere",
    law=5,
    found_by=("a-failed-attempt-leaves-no-trace",),
)
class FrozenAfterFailure(Source):
    """A failed attempt leaves the guest frozen."""

    def _fall_back(self) -> None:
        super()._fall_back()
        self._vm.freeze()


class _Unmarked(ReceivedPages):
    def __init__(self, memory: GuestMemory, **options: Any) -> None:
        silent: Any = _Instead(memory, wrote=lambda gfns: None)
        super().__init__(silent, **options)


@fault(
    "KVM dirty ring: what is written while no vCPU runs was missed; Cloud Hypervisor: VMM writes untracked",
    law=4,
    found_by=("what-arrives-is-marked",),
)
class RestoreNotMarked(Altered):
    """Pages that arrive are written and not marked."""

    part = _Unmarked


class _NeverLooks(Comparison):
    def _difference(self, starts: GfnArray, lengths: GfnArray, theirs: Digests) -> None:
        pass


@fault(
    "no bug on record: a proof that proves nothing",
    law=7,
    found_by=("verification-tells",),
)
class DigestsNotCompared(Altered):
    """The destination answers READY whatever the digests say."""

    part = _NeverLooks
