"""Which pages are zero, against a page-by-page answer."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import WORDS_PER_PAGE, page_words, zero_pages

PAGES = 512
MEMORY = GuestMemory.linear(PAGES * PAGE_SIZE)

#: Pages with content, and the word where they have it.
contents = st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, WORDS_PER_PAGE - 1))
#: Runs of frames that are asked for: long ones and scattered ones.
asked = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 200), st.integers(1, 5)), min_size=1, max_size=8)


@given(contents, asked, st.sampled_from([1, 1 << 63, (1 << 64) - 1]))
def test_zero_pages_are_those_without_a_bit(content, runs, value):
    words = page_words(MEMORY)
    words[:] = 0
    for gfn, word in content.items():
        words[gfn, word] = value
    frames = sorted({gfn for start, count, step in runs for gfn in range(start, min(start + count, PAGES), step)})
    zero = zero_pages(words, np.array(frames, np.uint64))
    assert zero.tolist() == [gfn not in content for gfn in frames]


def test_no_pages_give_an_empty_answer():
    assert zero_pages(page_words(MEMORY), np.empty(0, np.uint64)).tolist() == []


def test_words_are_the_memory_where_it_lies():
    words = page_words(MEMORY)
    MEMORY.write(3 * PAGE_SIZE + 8, b"\1")
    assert int(words[3, 1]) & 0xFF == 1
    words[3, 1] = 2
    assert MEMORY.read(3 * PAGE_SIZE + 8, 1) == b"\2"
