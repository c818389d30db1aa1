"""SendCounts against a count of single pages in a dictionary."""

from collections import Counter
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.engine.send_counts import SendCounts

SPARSE_16_GIB = (17 << 30) >> 12  # gfn limit of a guest of 16 GiB: the PCI hole lies inside


def frames(*gfns):
    return np.array(sorted(gfns), np.uint64)


def count(limit, rounds):
    counts = SendCounts(limit)
    for index, gfns in enumerate(rounds):
        for at in range(0, len(gfns), 7):  # in several records
            counts.add(index, frames(*sorted(gfns)[at : at + 7]))
    return counts.result()


@given(st.integers(1, 1 << 20), st.data())
def test_counts_are_those_of_single_pages(limit, data):
    rounds = data.draw(st.lists(st.sets(st.integers(0, limit - 1), max_size=30), max_size=8))
    result = count(limit, rounds)
    each = Counter(gfn for gfns in rounds for gfn in gfns)
    assert result.pages == len(each)
    assert result.rewritten_pages == sum(n > 1 for n in each.values())
    assert result.again_pages == sum(n - 1 for n in each.values())
    heat = result.heat
    assert sum(heat.pages) == len(each)
    assert heat.rounds_per_row == 1
    assert all(first % heat.cell_pages == 0 for first in heat.first_gfns)
    for row, gfns in zip(heat.rows, rounds, strict=False):
        cells = Counter(gfn // heat.cell_pages * heat.cell_pages for gfn in gfns)
        assert dict(zip(heat.first_gfns, row, strict=True)) == {first: cells[first] for first in heat.first_gfns}
    assert not any(rounds[len(heat.rows) :])


@pytest.mark.parametrize(("limit", "cell_pages"), [(1 << 16, 1 << 8), (SPARSE_16_GIB, 1 << 15)])
def test_the_heat_map_of_memory_sent_everywhere_has_256_cells_at_most(limit, cell_pages):
    counts = SendCounts(limit)
    counts.add(0, np.arange(0, limit, 16, dtype=np.uint64))
    heat = counts.result().heat
    assert heat.cell_pages == cell_pages
    assert len(heat.first_gfns) == -(-limit // cell_pages) <= 256


def test_the_heat_map_of_a_sparse_guest_has_only_places_of_which_something_was_sent():
    far = SPARSE_16_GIB - 1
    heat = count(SPARSE_16_GIB, [{0, 5, 1 << 20, far}, {far}]).heat
    assert heat.cell_pages <= 128
    assert heat.first_gfns == (0, 1 << 20, far // heat.cell_pages * heat.cell_pages)
    assert heat.pages == (2, 1, 1)
    assert heat.rows == ((2, 1, 1), (0, 0, 1))


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
