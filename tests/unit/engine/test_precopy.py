"""What the state will cost at a pause is rehearsed; one busy moment of the host is not believed."""

import pytest

from pageferry.engine.precopy import state_s


@pytest.mark.parametrize(
    ("takes_s", "result_s", "left"),
    [([0.004, 9], 0.008, 1), ([0.5, 0.003, 9], 0.006, 1), ([0.5, 0.3, 0.4, 9], 0.6, 1)],
)
def test_a_rehearsal_that_took_long_is_repeated_twice_and_the_shortest_counts(takes_s, result_s, left):
    now = [0.0]

    class Guest:
        def rehearse_state(self):
            now[0] += takes_s.pop(0)

    assert state_s(Guest(), lambda: now[0]) == pytest.approx(result_s)
    assert len(takes_s) == left
