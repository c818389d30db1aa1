"""Proof that two memories are equal: digests of runs of pages, compared before the guest may run (law 7).

The source digests every page that has storage, in runs of at most 2 MiB. The destination digests the same runs, and
proves that whatever else it has storage for is zero, as it is at the source. Where a run differs, digests of its
pages name the first frame.
"""

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap, split_runs
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.threads import OutOfThreadsError, begin
from pageferry.stream.ferry_frames import MAX_POPULATED_RUNS

DIGEST_BYTES = 16
_SAMPLE_PAGES = 8 * PAGES_PER_2M
#: A thread is begun for so many pieces of 2 MiB: for fewer it costs more time than it saves.
_PIECES_PER_THREAD = 4
#: How much one DIGESTS frame covers: enough to keep all cores busy, little enough that both sides work at once.
FRAME_PAGES = 64 * PAGES_PER_2M

DigestArray = NDArray[np.uint8]
"""uint8[n, 16]: one xxh3-128 digest (canonical, big-endian) per run."""


NO_DIGESTS: DigestArray = np.empty((0, DIGEST_BYTES), np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunDigests:
    """Runs of pages and their digests.

    Run i is ``pages[i]`` frames (uint64[n], 1 to 512 each) from ``first_gfns[i]`` (uint64[n]); ``digests`` is
    uint8[n, 16]. Runs ascend and are disjoint.
    """

    first_gfns: GfnArray
    pages: GfnArray
    digests: DigestArray

    def part(self, chosen: NDArray[np.bool_]) -> "RunDigests":
        """Return the runs that are chosen, bool[n]."""
        return RunDigests(first_gfns=self.first_gfns[chosen], pages=self.pages[chosen], digests=self.digests[chosen])


def populated_runs(memory: GuestMemory) -> tuple[GfnArray, GfnArray]:
    """Return the runs with storage, none longer than 2 MiB: what a verification digests. The guest is paused."""
    starts, lengths = memory.populated()
    return split_runs(starts, lengths, PAGES_PER_2M)


def digest_runs(memory: GuestMemory, starts: GfnArray, lengths: GfnArray) -> DigestArray:
    """Return the digest of each run, on all cores and mostly without the interpreter lock."""
    return digest_views(memory.views(starts, lengths), lengths)


def digest_views(views: list[memoryview], lengths: GfnArray) -> DigestArray:
    """Return the digest of each view, of so many pages, as :func:`digest_runs` does of guest memory."""
    if not views:
        return NO_DIGESTS
    # Tasks of about 2 MiB each, however short the runs are.
    edges = np.flatnonzero(np.diff(np.cumsum(lengths) // np.uint64(PAGES_PER_2M), append=np.uint64(1 << 62))) + 1
    tasks = [views[begin:end] for begin, end in pairwise([0, *edges.tolist()])]
    return np.frombuffer(b"".join(_digests_of(tasks)), np.uint8).reshape(-1, DIGEST_BYTES)


def _digests_of(tasks: list[list[memoryview]]) -> list[bytes]:
    """Work on this thread and on others, one a core at the most, as far as there is work and threads are available.

    Whatever fails on one of them is raised here, when all have ended.
    """
    digests = [b""] * len(tasks)
    left = deque(enumerate(tasks))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                try:
                    index, views = left.popleft()
                except IndexError:
                    return
                digests[index] = _digest_all(views)
        except BaseException as error:
            left.clear()
            failures.append(error)

    helpers = []
    with contextlib.suppress(OutOfThreadsError):
        for _ in range(min(len(tasks) // _PIECES_PER_THREAD, os.cpu_count() or 1) - 1):
            helpers.append(begin(work, "digest"))  # noqa: PERF401  # those before one that fails are there
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    return digests


def _digest_all(views: list[memoryview]) -> bytes:
    return b"".join(map(xxhash.xxh3_128_digest, views))


class ArrivalDigester:
    """Digests each whole 2 MiB whose pages arrive in order, in one record or several, as :func:`digest_runs` would."""

    def __init__(self) -> None:
        self._next_gfn = 0
        self._hash: xxhash.xxh3_128 | None = None

    def take(self, piece: range, data: memoryview) -> bytes | None:
        """Take the pages of a piece, which has just arrived; return the digest of 2 MiB where it is the last of them.

        Args:
            piece: frames, on both sides of no multiple of 512.
            data: what they hold.
        """
        if piece.start % PAGES_PER_2M == 0:
            self._hash = xxhash.xxh3_128()
        elif piece.start != self._next_gfn:
            self._hash = None
        if self._hash is None:
            return None
        self._hash.update(data)
        self._next_gfn = piece.stop
        if piece.stop % PAGES_PER_2M:
            return None
        digest, self._hash = self._hash.digest(), None
        return digest

    def forget(self) -> None:
        """Hear of pages that came otherwise, anywhere: 2 MiB that are under way are given up."""
        self._hash = None


def batches(lengths: GfnArray, max_pages: int, max_runs: int) -> Iterator[slice]:
    """Cut a list of runs into consecutive slices of about ``max_pages`` pages and at most ``max_runs`` runs each."""
    ends = np.cumsum(lengths)
    at = 0
    while at < lengths.size:
        done = int(ends[at - 1]) if at else 0
        end = int(np.searchsorted(ends, done + max_pages)) + 1
        end = min(end, at + max_runs, lengths.size)
        yield slice(at, end)
        at = end


def first_difference(ours: DigestArray, theirs: DigestArray) -> int | None:
    """Return the index of the first digest that differs, or None when all are equal.

    Args:
        ours: uint8[n, 16].
        theirs: uint8[n, 16].
    """
    different = np.flatnonzero((ours != theirs).any(axis=1))
    return int(different[0]) if different.size else None


def page_digests(memory: GuestMemory, first_gfn: int, pages: int) -> NDArray[np.uint64]:
    """Return xxh3-64 of each page of a run, uint64[pages]: to name the first page that differs, once there is one."""
    gfns = np.arange(first_gfn, first_gfn + pages, dtype=np.uint64)
    return np.array([xxhash.xxh3_64_intdigest(view) for view in memory.page_views(gfns)], np.uint64)


def different_pages(memory: GuestMemory, first_gfn: int, theirs: NDArray[np.uint64]) -> GfnArray:
    """Return the frames of a run whose digests are not ``theirs`` (uint64[pages]), ascending.

    Raises:
        VmError: the run is not RAM.
    """
    different = np.flatnonzero(page_digests(memory, first_gfn, theirs.size) != theirs)
    return np.uint64(first_gfn) + different.astype(np.uint64)


def first_nonzero(memory: GuestMemory, gfns: DirtyBitmap) -> int | None:
    """Return the first of these frames of RAM that is not zero, or None."""
    run_starts, run_lengths = gfns.runs(max_pages=PAGES_PER_2M)
    for start, view in zip(run_starts.tolist(), memory.views(run_starts, run_lengths), strict=True):
        pages = np.frombuffer(view, np.uint64).reshape(-1, PAGE_SIZE // 8).any(axis=1)
        if pages.any():
            return int(start + np.flatnonzero(pages)[0])
    return None


def sample_runs(starts: GfnArray, lengths: GfnArray) -> tuple[GfnArray, GfnArray]:
    """Return the first few of the runs: enough to measure how fast this host digests."""
    enough = int(np.searchsorted(np.cumsum(lengths), _SAMPLE_PAGES)) + 1
    return starts[:enough], lengths[:enough]


def hint_runs(starts: GfnArray, lengths: GfnArray) -> tuple[tuple[int, int], ...]:
    """Return the longest of the runs, at most ``MAX_POPULATED_RUNS``, as (first gfn, pages), ascending.

    For a destination that prepares: all of it will be sent, but not only that.
    """
    longest = np.sort(np.argsort(lengths, kind="stable")[-MAX_POPULATED_RUNS:])
    return tuple(zip(starts[longest].tolist(), lengths[longest].tolist(), strict=True))
