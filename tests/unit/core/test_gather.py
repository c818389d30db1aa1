"""What is left of a queue of buffers after a call that moved some of its bytes."""

import pytest

from pageferry.core.gather import first_left


@pytest.mark.parametrize(
    ("at", "moved_bytes", "first", "left"),
    [(0, 0, 0, b"abcdef"), (0, 2, 0, b"cdef"), (0, 3, 1, b"def"), (1, 2, 2, b"f"), (1, 3, 3, b"")],
)
def test_what_was_moved_is_passed_over_and_the_rest_is_left(at, moved_bytes, first, left):
    queue = [memoryview(part) for part in (b"abc", b"d", b"ef")]
    assert first_left(queue, at, moved_bytes) == first
    assert b"".join(queue[first:]) == left
