"""DirtyBitmap: one bit per guest frame, in the layout of ``KVM_GET_DIRTY_LOG``.

Every operation is vectorised and costs at most one pass over the words; nothing loops over pages in Python.
"""

import mmap
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pageferry.core.frames import GfnArray

_WORD_BITS = 64
_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
#: From here on (the bitmap of 1 GiB) storage comes straight from the kernel, which zeroes what is touched. malloc would
#: zero all of what it has used before.
_LARGE_WORDS = 65536
#: From here on it is quicker to set a run of frames as words than bit by bit.
_LONG_RUN = 128


def runs_of(gfns: GfnArray) -> tuple[GfnArray, GfnArray]:
    """Group ascending, distinct frames into runs of neighbours.

    Args:
        gfns: uint64[n], strictly ascending.

    Returns:
        ``(starts, lengths)``, uint64[m] each: run i is frames ``starts[i] .. starts[i] + lengths[i] - 1``.
    """
    if gfns.size == 0:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    if int(gfns[-1]) - int(gfns[0]) == gfns.size - 1:  # one run, as most batches of a guest's memory are
        return gfns[:1].copy(), np.array([gfns.size], np.uint64)
    first = np.concatenate(([0], np.flatnonzero(gfns[1:] - gfns[:-1] != 1) + 1))
    return gfns[first], np.diff(np.append(first, gfns.size)).astype(np.uint64)


def places_of(gfns: GfnArray) -> "slice | NDArray[np.intp]":
    """Return what picks these frames (uint64[n], strictly ascending, n at least 1) out of an array with one row each.

    A slice where they are one run: that takes no look-up, and no copy to read.
    """
    first, last = int(gfns[0]), int(gfns[-1])
    return slice(first, last + 1) if last - first == gfns.size - 1 else gfns.astype(np.intp)


def split_runs(starts: GfnArray, lengths: GfnArray, max_pages: int) -> tuple[GfnArray, GfnArray]:
    """Cut runs into pieces of at most ``max_pages`` pages, in order.

    Args:
        starts: uint64[m], first frame of each run.
        lengths: uint64[m], pages in each run, each at least 1.
        max_pages: at least 1.
    """
    limit = np.uint64(max_pages)
    pieces = ((lengths + limit - np.uint64(1)) // limit).astype(np.int64)
    if not pieces.size or int(pieces.max()) == 1:
        return starts, lengths
    owner = np.repeat(np.arange(starts.size), pieces)
    nth = (np.arange(owner.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)).astype(np.uint64)
    return starts[owner] + nth * limit, np.minimum(limit, lengths[owner] - nth * limit)


def expand_runs(starts: GfnArray, lengths: GfnArray) -> GfnArray:
    """Return every frame of the runs, in order: the inverse of :func:`runs_of`."""
    counts = lengths.astype(np.int64)
    offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + offsets.astype(np.uint64)


def run_of(gfns: GfnArray) -> range | None:
    """Return frames (uint64[n], n at least 1) as a range, if they are neighbours, in order and each once; else None."""
    first, last = int(gfns[0]), int(gfns[-1])
    if last - first != gfns.size - 1 or not (gfns[1:] - gfns[:-1] == 1).all():
        return None
    return range(first, last + 1)


def _is_one_run(gfns: GfnArray) -> bool:
    """Tell whether frames are one run, where that saves work."""
    return gfns.size >= _LONG_RUN and run_of(gfns) is not None


def _zeros(n_words: int) -> NDArray[np.uint64]:
    if n_words < _LARGE_WORDS:
        return np.zeros(n_words, np.uint64)
    # SAFETY: the array keeps the mapping alive.
    return np.frombuffer(mmap.mmap(-1, n_words << 3, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint64)


class DirtyBitmap:
    """A set of frames ``0 .. nbits-1``.

    ``words`` is uint64[ceil(nbits/64)]; bit i of word w is frame 64w+i. Bits past ``nbits`` in the last word are
    always 0 after any method here; a caller that writes ``words`` directly (a kernel call) keeps it so.

    Args:
        nbits: how many frames, at least 0. A multiple of 64 is not required.
        words: storage to take over, or None for all zeros: cheap whatever the size, until it is touched.
    """

    __slots__ = ("nbits", "words")

    def __init__(self, nbits: int, words: NDArray[np.uint64] | None = None) -> None:
        n_words = (nbits + _WORD_BITS - 1) // _WORD_BITS
        if words is None:
            words = _zeros(n_words)
        if words.dtype != np.uint64 or words.shape != (n_words,):
            raise ValueError(f"{nbits} bits need uint64[{n_words}], not {words.dtype}{list(words.shape)}")
        self.nbits = nbits
        self.words = words

    @classmethod
    def of(cls, nbits: int, gfns: ArrayLike) -> Self:
        """Return a bitmap with exactly ``gfns`` set."""
        bitmap = cls(nbits)
        bitmap.set(gfns)
        return bitmap

    def copy(self) -> "DirtyBitmap":
        """Return an independent copy."""
        return DirtyBitmap(self.nbits, self.words.copy())

    def _checked(self, gfns: ArrayLike) -> GfnArray:
        array = np.atleast_1d(np.asarray(gfns))
        if array.size == 0:
            return np.empty(0, np.uint64)
        if array.dtype.kind == "i" and int(array.min()) < 0:
            raise IndexError(f"frame {int(array.min())} is negative")
        if array.dtype.kind not in "iu":
            raise TypeError(f"frames are integers, not {array.dtype}")
        if int(array.max()) >= self.nbits:
            raise IndexError(f"frame {int(array.max()):#x} is outside a bitmap of {self.nbits:#x}")
        return array.astype(np.uint64, copy=False)

    def set(self, gfns: ArrayLike) -> None:
        """Set the bits of ``gfns`` (an int or integers[n], any order, repeats allowed).

        Raises:
            IndexError: a frame is outside the bitmap; nothing was set.
        """
        array = self._checked(gfns)
        if _is_one_run(array):
            self.set_range(int(array[0]), array.size)
        else:
            np.bitwise_or.at(self.words, array >> np.uint64(6), np.uint64(1) << (array & np.uint64(63)))

    def test_and_set(self, gfn: int) -> bool:
        """Set one bit and tell whether it was set before: for a few frames, where an array costs more than the work.

        Raises:
            IndexError: the frame is outside the bitmap.
        """
        if not 0 <= gfn < self.nbits:
            raise IndexError(f"frame {gfn:#x} is outside a bitmap of {self.nbits:#x}")
        word, bit = int(self.words[gfn >> 6]), 1 << (gfn & 63)
        self.words[gfn >> 6] = word | bit
        return bool(word & bit)

    def clear(self, gfns: ArrayLike) -> None:
        """Clear the bits of ``gfns``; as :meth:`set` otherwise."""
        array = self._checked(gfns)
        if _is_one_run(array):
            self.clear_range(int(array[0]), array.size)
        else:
            np.bitwise_and.at(self.words, array >> np.uint64(6), ~(np.uint64(1) << (array & np.uint64(63))))

    def _range_mask(self, first: int, count: int) -> tuple[slice, NDArray[np.uint64]]:
        if first < 0 or count < 0 or first + count > self.nbits:
            raise IndexError(f"frames {first:#x}+{count:#x} are outside a bitmap of {self.nbits:#x}")
        low, high = first // _WORD_BITS, (first + count + _WORD_BITS - 1) // _WORD_BITS
        mask = np.full(high - low if count else 0, _ONES)
        if mask.size:
            mask[0] &= _ONES << np.uint64(first % _WORD_BITS)
            mask[-1] &= _ONES >> np.uint64(-(first + count) % _WORD_BITS)
        return slice(low, low + mask.size), mask

    def set_range(self, first: int, count: int) -> None:
        """Set frames ``first .. first+count-1``.

        Raises:
            IndexError: the range is not inside the bitmap; nothing was set.
        """
        where, mask = self._range_mask(first, count)
        self.words[where] |= mask

    def set_runs(self, starts: GfnArray, lengths: GfnArray) -> None:
        """Set the frames of many runs; the inverse of :meth:`runs`. Cost grows with the runs and the words they span.

        Args:
            starts: uint64[m], first frames; order and overlap do not matter.
            lengths: uint64[m], pages in each run, each at least 1.

        Raises:
            IndexError: a frame is outside the bitmap; nothing was set.
        """
        if not starts.size:
            return
        starts, last = self._checked(starts), self._checked(starts + lengths - np.uint64(1))
        begins, ends = (starts >> np.uint64(6)).astype(np.int64), (last >> np.uint64(6)).astype(np.int64)
        heads = _ONES << (starts & np.uint64(63))
        tails = _ONES >> (np.uint64(63) - (last & np.uint64(63)))
        one_word = begins == ends
        np.bitwise_or.at(self.words, begins, np.where(one_word, heads & tails, heads))
        np.bitwise_or.at(self.words, ends[~one_word], tails[~one_word])
        low = int(begins.min())
        depth = np.zeros(int(ends.max()) - low + 1, np.int64)  # how many runs cover a whole word: +1 ... -1, summed
        np.add.at(depth, begins[~one_word] + (1 - low), 1)
        np.subtract.at(depth, ends[~one_word] - low, 1)
        self.words[low : low + depth.size][np.cumsum(depth) > 0] = _ONES

    def clear_range(self, first: int, count: int) -> None:
        """Clear frames ``first .. first+count-1``; as :meth:`set_range` otherwise."""
        where, mask = self._range_mask(first, count)
        self.words[where] &= ~mask

    def words_of(self, gfns: range) -> slice:
        """Return where the words of a range of frames lie, which no frame beside the range may share.

        What lies past the end of the bitmap is left out; an empty range has no words.

        Raises:
            ValueError: its start is negative or no multiple of 64, its stop is inside the bitmap and no multiple of
                64, or it has a step.
        """
        first, stop = gfns.start, gfns.stop
        if gfns.step != 1 or first < 0 or first % _WORD_BITS or (stop % _WORD_BITS and stop < self.nbits):
            raise ValueError(f"frames {first:#x}..{stop:#x} of {self.nbits:#x} are not whole words of a bitmap")
        low = min(first // _WORD_BITS, self.words.size)
        return slice(low, max(low, min(-(-stop // _WORD_BITS), self.words.size)))

    def take(self, gfns: range) -> "DirtyBitmap":
        """Move the bits of a range out: return them in a bitmap of the same size, and clear them here.

        Raises:
            ValueError: as :meth:`words_of`; no bit was moved.
        """
        where = self.words_of(gfns)
        if where == slice(0, self.words.size):
            taken = self.copy()  # all of the storage is touched: malloc's is cheaper
        else:
            taken = DirtyBitmap(self.nbits)
            taken.words[where] = self.words[where]
        self.words[where] = 0
        return taken

    def test(self, gfn: int) -> bool:
        """Tell whether frame ``gfn`` is set."""
        return bool(self.test_many(gfn)[0])

    def test_many(self, gfns: ArrayLike) -> NDArray[np.bool_]:
        """Tell for each of ``gfns`` whether it is set, as bool[n]."""
        array = self._checked(gfns)
        bits = (self.words[array >> np.uint64(6)] >> (array & np.uint64(63))) & np.uint64(1)
        result: NDArray[np.bool_] = bits.astype(np.bool_)
        return result

    def has_runs(self, starts: GfnArray, lengths: GfnArray) -> bool:
        """Tell whether every frame of many runs is set; of none they are. Cost grows with the words that they span.

        Args:
            starts: uint64[m], first frames; one outside the bitmap is not set.
            lengths: uint64[m], pages in each run, each at least 1.
        """
        if not starts.size:
            return True
        size = np.uint64(self.nbits)
        if (starts >= size).any() or (lengths > size - starts).any():
            return False
        low = int(starts.min()) // _WORD_BITS
        begin = np.uint64(low * _WORD_BITS)
        wanted = DirtyBitmap(int((starts + lengths).max() - begin))
        wanted.set_runs(starts - begin, lengths)
        return not (wanted.words & ~self.words[low : low + wanted.words.size]).any()

    def in_runs(self, starts: GfnArray, lengths: GfnArray) -> NDArray[np.int64]:
        """Return how many frames of each run are set, int64[m]. Cost grows with the runs and the words from end to end.

        Args:
            starts: uint64[m], first frames.
            lengths: uint64[m], pages in each run, each at least 1.

        Raises:
            IndexError: a frame is outside the bitmap.
        """
        if not starts.size:
            return np.zeros(0, np.int64)
        starts, last = self._checked(starts), self._checked(starts + lengths - np.uint64(1))
        begins, ends = (starts >> np.uint64(6)).astype(np.int64), (last >> np.uint64(6)).astype(np.int64)
        low = int(begins.min())
        words = self.words[low : int(ends.max()) + 1]
        upto = np.cumsum(np.bitwise_count(words), dtype=np.int64)  # each word counted in
        begins, ends = begins - low, ends - low
        before = words[begins] & ~(_ONES << (starts & np.uint64(63)))
        behind = words[ends] & ~(_ONES >> (np.uint64(63) - (last & np.uint64(63))))
        whole = upto[ends] - upto[begins] + np.bitwise_count(words[begins])
        return whole - np.bitwise_count(before) - np.bitwise_count(behind)

    def count(self) -> int:
        """Return how many bits are set."""
        return int(np.bitwise_count(self.words).sum(dtype=np.uint64))

    def any(self) -> bool:
        """Tell whether a bit is set."""
        return bool(self.words.any())

    def gfns(self, within: range | None = None) -> GfnArray:
        """Return the frames that are set, uint64[count], ascending.

        Args:
            within: look at this range only; cost grows with it, not with the bitmap.

        Raises:
            ValueError: as :meth:`words_of`.
        """
        part = slice(0, self.words.size) if within is None else self.words_of(within)
        where = np.flatnonzero(self.words[part]) + part.start
        return _gfns_of(where, self.words[where])

    def runs(self, *, max_pages: int | None = None) -> tuple[GfnArray, GfnArray]:
        """Return the set frames as runs; see :func:`runs_of`. Cost grows with words and runs, not with frames."""
        # A bit that differs from the one before it begins or ends a run, in turn: in a word with a bit, or the next.
        used = np.zeros(self.words.size + 1, np.bool_)
        np.not_equal(self.words, 0, out=used[:-1])
        used[1:] |= used[:-1].copy()
        where = np.flatnonzero(used)
        words = self.words.take(where, mode="clip")
        if where.size and where[-1] == self.words.size:
            words[-1] = 0
        before = words[:-1] >> np.uint64(_WORD_BITS - 1)
        before[np.diff(where) != 1] = 0
        edged = words ^ (words << np.uint64(1))
        edged[1:] ^= before
        edges = _gfns_of(where, edged)
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        return (starts, lengths) if max_pages is None else split_runs(starts, lengths, max_pages)

    def __ior__(self, other: "DirtyBitmap") -> Self:
        """Set every bit that is set in ``other``."""
        self._same_size(other)
        self.words |= other.words
        return self

    def __iand__(self, other: "DirtyBitmap") -> Self:
        """Keep only the bits that are set in ``other`` too."""
        self._same_size(other)
        self.words &= other.words
        return self

    def __isub__(self, other: "DirtyBitmap") -> Self:
        """Clear every bit that is set in ``other`` (and-not)."""
        self._same_size(other)
        self.words &= ~other.words
        return self

    def __or__(self, other: "DirtyBitmap") -> "DirtyBitmap":
        result = self.copy()
        result |= other
        return result

    def __sub__(self, other: "DirtyBitmap") -> "DirtyBitmap":
        result = self.copy()
        result -= other
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        return self.nbits == other.nbits and bool(np.array_equal(self.words, other.words))

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"DirtyBitmap({self.count()} of {self.nbits})"

    def _same_size(self, other: "DirtyBitmap") -> None:
        if self.nbits != other.nbits:
            raise ValueError(f"bitmaps of {self.nbits} and {other.nbits} frames do not combine")


def _gfns_of(where: NDArray[np.int64], words: NDArray[np.uint64]) -> GfnArray:
    """Return the frames of the bits set in ``words``, which are at ``where`` in their bitmap, ascending."""
    bits = np.unpackbits(words.astype("<u8", copy=False).view(np.uint8), bitorder="little")
    nth = np.flatnonzero(bits)
    gfns: GfnArray = (where[nth >> 6].astype(np.uint64) << np.uint64(6)) | (nth & 63).astype(np.uint64)
    return gfns
