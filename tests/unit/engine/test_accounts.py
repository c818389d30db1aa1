"""SendCounts against a count of single pages in a dictionary."""

from collections import Counter
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.engine.accounts import SendCounts

SPARSE_16_GIB = (17 << 30) >> 12  # gfn limit of a guest of 16 GiB: the PCI hole lies inside


def frames(*gfns):
    return np.array(sorted(gfns), np.uint64)


def count(limit, rounds, *, record_pages=1024):
    counts = SendCounts(limit)
    for index, gfns in enumerate(rounds):
        for at in range(0, len(gfns), record_pages):
            counts.add(index, frames(*sorted(gfns)[at : at + record_pages]))
    return counts.result()


@given(st.integers(1, 1 << 20), st.data())
def test_counts_are_those_of_single_pages(limit, data):
    rounds = data.draw(st.lists(st.sets(st.integers(0, limit - 1), max_size=30), max_size=8))
    result = count(limit, rounds, record_pages=7)
    each = Counter(gfn for gfns in rounds for gfn in gfns)
    assert result.pages == len(each)
    assert result.rewritten_pages == sum(n > 1 for n in each.values())
    assert result.again_pages == sum(n - 1 for n in each.values())
    heat = result.heat
    assert sum(heat.pages) == len(each)
    assert heat.rounds_per_row == 1
    cells = list(zip(heat.first_gfns, heat.last_gfns, strict=True))
    assert all(before[1] < after[0] for before, after in pairwise(cells))
    assert list(heat.pages) == [sum(first <= gfn <= last for gfn in each) for first, last in cells]
    for row, gfns in zip(heat.rows, rounds, strict=False):
        assert list(row) == [sum(first <= gfn <= last for gfn in gfns) for first, last in cells]
    assert not any(rounds[len(heat.rows) :])


@pytest.mark.parametrize("limit", [1 << 16, SPARSE_16_GIB])
def test_the_heat_map_of_memory_sent_everywhere_is_some_200_cells_alike(limit):
    counts = SendCounts(limit)
    counts.add(0, np.arange(0, limit, 16, dtype=np.uint64))
    heat = counts.result().heat
    assert 200 < len(heat.pages) <= 256
    assert max(heat.pages) - min(heat.pages[:-1]) <= 8  # of a counted cell of 128 frames


def test_the_heat_map_of_a_sparse_guest_has_only_places_of_which_something_was_sent():
    far = SPARSE_16_GIB - 1
    heat = count(SPARSE_16_GIB, [{0, 5, 1 << 20, far}, {far}]).heat
    assert heat.first_gfns == (0, 1 << 20, far & ~127)
    assert heat.last_gfns == (127, (1 << 20) + 127, far)
    assert heat.pages == (2, 1, 1)
    assert heat.rows == ((2, 1, 1), (0, 0, 1))


def test_single_pages_all_over_memory_take_no_room_from_what_lies_together():
    together, single = range(1 << 20, (1 << 20) + 25_600), range(0, SPARSE_16_GIB, 1 << 15)
    counts = SendCounts(SPARSE_16_GIB)
    counts.add(0, frames(*{*together, *single}))
    heat = counts.result().heat
    assert sum(first in together for first in heat.first_gfns) > 180
    assert len(heat.first_gfns) <= 256


def heat_of_areas(areas):
    starts = [index * 8192 for index in range(areas)]
    counts = SendCounts(SPARSE_16_GIB)
    counts.add(0, frames(*(start + page for start in starts for page in range(0, 2048, 3))))
    return counts.result().heat


@pytest.mark.parametrize("areas", [1, 2, 31, 32])
def test_no_cell_lies_on_both_sides_of_a_long_gap(areas):
    heat = heat_of_areas(areas)
    assert all(last - first < 2048 for first, last in zip(heat.first_gfns, heat.last_gfns, strict=True))
    assert areas <= len(heat.first_gfns) <= 256


@pytest.mark.parametrize("areas", [33, 500])
def test_of_many_areas_some_share_cells(areas):
    heat = heat_of_areas(areas)
    assert sum(last - first < 2048 for first, last in zip(heat.first_gfns, heat.last_gfns, strict=True)) > 30
    assert len(heat.first_gfns) <= 256


@pytest.mark.parametrize("rounds", [64, 65, 200, 1000])
def test_many_rounds_share_rows_and_none_is_lost(rounds):
    heat = count(8, [{index % 8} for index in range(rounds)]).heat
    assert len(heat.rows) <= 64
    assert [sum(row) for row in heat.rows] == [
        min(heat.rounds_per_row, rounds - first) for first in range(0, rounds, heat.rounds_per_row)
    ]


def test_a_count_ends_at_its_greatest_number_and_does_not_begin_anew():
    counts = SendCounts(4)
    counts._sent[3] = (1 << 16) - 3
    for _ in range(5):
        counts.add(0, frames(3))
    result = counts.result()
    assert (result.pages, result.again_pages) == (1, (1 << 16) - 2)
    assert result.heat.rows == ((5,),)


def test_nothing_sent_is_nothing_told():
    result = SendCounts(1000).result()
    assert (result.pages, result.again_pages, result.hot, result.heat.rows) == (0, 0, (), ())


def test_the_hot_ranges_are_where_pages_were_sent_most_often():
    everything = set(range(40_000))
    hot = set(range(1000, 1100)) | set(range(30_000, 30_400, 2))
    lukewarm = set(range(5000, 5100))
    result = count(1 << 16, [everything, hot | lukewarm, hot, hot, hot])
    assert [(each.first_gfn, each.pages) for each in result.hot] == [(30_000, 399), (1000, 100)]
    assert [each.again_pages for each in result.hot] == [4 * 200, 4 * 100]
    assert [each.sent_pages for each in result.hot] == [399 + 4 * 200, 5 * 100]
    assert result.again_pages == 4 * 300 + 100


def test_pages_written_at_random_are_one_range_and_a_far_page_is_another():
    random = np.random.default_rng(1).choice(1 << 18, 4000, replace=False) + (1 << 19)
    result = count(1 << 21, [{2, *random.tolist()}] * 2)
    assert [each.again_pages for each in result.hot] == [4000, 1]
    assert result.hot[0].first_gfn == random.min()
    assert result.hot[0].first_gfn + result.hot[0].pages - 1 == random.max()
    assert (result.hot[1].first_gfn, result.hot[1].pages) == (2, 1)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 5000)), min_size=1, max_size=20))
def test_hot_ranges_are_disjoint_and_few_and_hold_every_hot_page(pieces):
    ends = list(accumulate(length + gap for length, gap in pieces))
    hot = {end - gap - 1 - at for end, (length, gap) in zip(ends, pieces, strict=True) for at in range(length)}
    result = count(ends[-1], [hot, hot])
    assert len(result.hot) <= 8
    assert sum(each.again_pages for each in result.hot) == len(hot)
    spans = sorted((each.first_gfn, each.first_gfn + each.pages) for each in result.hot)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
