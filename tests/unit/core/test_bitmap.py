import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.bitmap import DirtyBitmap, expand_runs, places_of, runs_of, split_runs


def u64(*values):
    return np.array(values, np.uint64)


def test_layout_is_that_of_kvm_get_dirty_log():
    bitmap = DirtyBitmap.of(200, [0, 63, 64, 130])
    assert bitmap.words.tolist() == [(1 << 63) | 1, 1, 1 << 2, 0]


@pytest.mark.parametrize("nbits", [0, 1, 63, 64, 65, 1000])
def test_a_full_range_sets_exactly_nbits(nbits):
    bitmap = DirtyBitmap(nbits)
    bitmap.set_range(0, nbits)
    assert bitmap.count() == nbits
    assert bitmap.gfns().tolist() == list(range(nbits))


@pytest.mark.parametrize("gfns", [[-1], [65], [3, 1 << 40], u64(2**64 - 1)])
def test_frames_outside_are_refused_and_nothing_is_set(gfns):
    bitmap = DirtyBitmap(65)
    with pytest.raises((IndexError, OverflowError)):
        bitmap.set(np.append(np.asarray(gfns), np.asarray([5], np.asarray(gfns).dtype)))
    assert not bitmap.any()


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (60, 6), (0, 66), (5, -1)])
def test_ranges_outside_are_refused(first, count):
    bitmap = DirtyBitmap(65)
    with pytest.raises(IndexError):
        bitmap.set_range(first, count)
    assert not bitmap.any()


def test_storage_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="need uint64"):
        DirtyBitmap(65, np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match="do not combine"):
        DirtyBitmap(65).__ior__(DirtyBitmap(66))
    with pytest.raises(TypeError):
        DirtyBitmap(65).set([0.5])


RUN = list(range(37, 537))


@pytest.mark.parametrize(
    "frames",
    [RUN, RUN[::-1], [*RUN[:100], 700, *RUN[101:]], [*RUN[:100], RUN[99], *RUN[101:]], [*RUN[:9], 11, 10, *RUN[11:]]],
    ids=["one run", "backwards", "one elsewhere", "one twice", "out of order"],
)
def test_many_frames_are_set_and_cleared_as_single_ones_are(frames):
    bitmap = DirtyBitmap(1000)
    bitmap.set_range(0, 1000)
    bitmap.clear(u64(*frames))
    assert set(bitmap.gfns().tolist()) == set(range(1000)) - set(frames)
    bitmap = DirtyBitmap(1000)
    bitmap.set(u64(*frames))
    assert set(bitmap.gfns().tolist()) == set(frames)


@pytest.mark.parametrize("gfns", [u64(7), u64(3, 4, 5), u64(3, 5), u64(3, 4, 6, 7)])
def test_frames_pick_their_rows_and_one_run_does_so_without_a_copy(gfns):
    rows = np.arange(10)
    picked = rows[places_of(gfns)]
    assert picked.tolist() == gfns.tolist()
    assert np.shares_memory(picked, rows) == (runs_of(gfns)[0].size == 1)


sizes = st.integers(1, 300)


@st.composite
def sets(draw, count=1):
    nbits = draw(sizes)
    frames = st.sets(st.integers(0, nbits - 1))
    return (nbits, *(draw(frames) for _ in range(count)))


@given(sets(count=2))
def test_bitmap_is_a_set(data):
    nbits, first, second = data
    a, b = DirtyBitmap.of(nbits, sorted(first)), DirtyBitmap.of(nbits, list(second) * 2)
    assert a.gfns().tolist() == sorted(first)
    assert a.count() == len(first)
    assert a.any() == bool(first)
    assert (a | b).gfns().tolist() == sorted(first | second)
    assert (a - b).gfns().tolist() == sorted(first - second)
    both = a.copy()
    both &= b
    assert both.gfns().tolist() == sorted(first & second)
    assert (a == b) == (first == second)
    assert a.test_many(list(range(nbits))).tolist() == [i in first for i in range(nbits)]
    a.clear(sorted(second))
    assert a.gfns().tolist() == sorted(first - second)


@given(sets(), st.data())
def test_ranges_agree_with_a_set(data, draw):
    nbits, frames = data
    first = draw.draw(st.integers(0, nbits))
    count = draw.draw(st.integers(0, nbits - first))
    bitmap = DirtyBitmap.of(nbits, sorted(frames))
    bitmap.set_range(first, count)
    assert set(bitmap.gfns().tolist()) == frames | set(range(first, first + count))
    bitmap.clear_range(first, count)
    assert set(bitmap.gfns().tolist()) == frames - set(range(first, first + count))


@given(sets(), st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_take_moves_the_bits_of_a_range(data, low, high, odd):
    nbits, frames = data
    gfns = range(64 * low, max(nbits, 64 * high) + 1 if odd else 64 * high)
    bitmap = DirtyBitmap.of(nbits, sorted(frames))
    assert bitmap.gfns(gfns).tolist() == sorted(frames & set(gfns))
    taken = bitmap.take(gfns)
    assert taken.nbits == nbits
    assert set(taken.gfns().tolist()) == frames & set(gfns)
    assert set(bitmap.gfns().tolist()) == frames - set(gfns)
    taken.words[:] = 0
    assert set(bitmap.gfns().tolist()) == frames - set(gfns)


@pytest.mark.parametrize(
    "gfns",
    [range(1, 64), range(32, 96), range(65), range(129), range(-64, 64), range(0, 192, 2), range(191, -1, -1)],
)
def test_a_range_that_shares_a_word_is_refused_and_nothing_is_taken(gfns):
    bitmap = DirtyBitmap.of(130, range(130))
    for refused in (bitmap.take, bitmap.gfns):
        with pytest.raises(ValueError, match="whole words"):
            refused(gfns)
    assert bitmap.count() == 130


def test_a_large_bitmap_is_as_a_small_one():
    nbits = (32 << 18) + 1
    bitmap = DirtyBitmap.of(nbits, [0, nbits - 1])
    copy = bitmap.copy()
    assert bitmap.take(range(64, nbits)).gfns().tolist() == [nbits - 1]
    assert (bitmap.gfns().tolist(), copy.gfns().tolist()) == ([0], [0, nbits - 1])


@given(sets(), st.integers(1, 70))
def test_runs_cover_the_frames_in_order(data, max_pages):
    nbits, frames = data
    starts, lengths = DirtyBitmap.of(nbits, sorted(frames)).runs(max_pages=max_pages)
    assert expand_runs(starts, lengths).tolist() == sorted(frames)
    assert all(1 <= length <= max_pages for length in lengths.tolist())


def test_runs_are_as_long_as_they_can_be():
    starts, lengths = runs_of(u64(1, 2, 3, 7, 9, 10))
    assert (starts.tolist(), lengths.tolist()) == ([1, 7, 9], [3, 1, 2])
    starts, lengths = split_runs(u64(0, 100), u64(5, 2), 2)
    assert (starts.tolist(), lengths.tolist()) == ([0, 2, 4, 100], [2, 2, 1, 2])


@given(
    st.integers(1, 700),
    st.lists(st.tuples(st.integers(0, 699), st.integers(1, 300)), max_size=12),
    st.sets(st.integers(0, 699), max_size=5),
)
def test_many_runs_are_set_at_once(nbits, runs, before):
    runs = [(start, min(length, nbits - start)) for start, length in runs if start < nbits]
    bitmap = DirtyBitmap.of(nbits, np.array([gfn for gfn in before if gfn < nbits], np.uint64))
    expected = {gfn for gfn in before if gfn < nbits} | {g for start, n in runs for g in range(start, start + n)}
    bitmap.set_runs(u64(*(start for start, _ in runs)), u64(*(length for _, length in runs)))
    assert set(bitmap.gfns().tolist()) == expected
    assert bitmap == DirtyBitmap.of(nbits, np.array(sorted(expected), np.uint64))


@pytest.mark.parametrize("run", [(60, 6), (65, 1), (0, 66), (2**64 - 1, 3)])
def test_runs_outside_are_refused_and_nothing_is_set(run):
    bitmap = DirtyBitmap(65)
    with pytest.raises(IndexError):
        bitmap.set_runs(u64(3, run[0]), u64(2, run[1]))
    assert not bitmap.any()


@given(
    st.integers(1, 700),
    st.lists(st.tuples(st.integers(0, 699), st.integers(1, 300)), max_size=6),
    st.sets(st.integers(0, 699), max_size=5),
)
def test_runs_are_there_when_each_of_their_frames_is_set(nbits, runs, missing):
    frames = {g for start, n in runs for g in range(start, start + n)}
    bitmap = DirtyBitmap.of(nbits, np.array([gfn for gfn in frames - missing if gfn < nbits], np.uint64))
    starts, lengths = u64(*(start for start, _ in runs)), u64(*(length for _, length in runs))
    assert bitmap.has_runs(starts, lengths) == (not frames & missing and all(gfn < nbits for gfn in frames))


@pytest.mark.parametrize("run", [(60, 6), (65, 1), (2**64 - 1, 3), (3, 2**64 - 1)])
def test_runs_outside_are_not_there(run):
    bitmap = DirtyBitmap.of(65, np.arange(65, dtype=np.uint64))
    assert bitmap.has_runs(u64(3, 60), u64(2, 5))
    assert not bitmap.has_runs(u64(3, run[0]), u64(2, run[1]))


@given(
    st.integers(1, 700),
    st.lists(st.tuples(st.integers(0, 699), st.integers(1, 300)), max_size=6),
    st.sets(st.integers(0, 699)),
)
def test_of_each_run_the_frames_that_are_set_are_counted(nbits, runs, frames):
    bitmap = DirtyBitmap.of(nbits, np.array([gfn for gfn in frames if gfn < nbits], np.uint64))
    runs = [(start, n) for start, n in runs if start + n <= nbits]
    starts, lengths = u64(*(start for start, _ in runs)), u64(*(length for _, length in runs))
    expected = [len(frames.intersection(range(start, start + n))) for start, n in runs]
    assert bitmap.in_runs(starts, lengths).tolist() == expected
    with pytest.raises(IndexError):
        bitmap.in_runs(u64(0, nbits - 1), u64(1, 2))


@given(st.integers(1, 300), st.lists(st.integers(0, 299)))
def test_test_and_set_is_that_of_a_set(nbits, gfns):
    bitmap, model = DirtyBitmap(nbits), set()
    for gfn in [*gfns, nbits - 1]:
        if gfn < nbits:
            assert bitmap.test_and_set(gfn) == (gfn in model)
            model.add(gfn)
    assert set(bitmap.gfns().tolist()) == model
    for outside in (nbits, -1):
        with pytest.raises(IndexError):
            bitmap.test_and_set(outside)
