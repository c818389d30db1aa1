import pytest

from pageferry.core.guest_time import WorkSample, lost_s, rate_before, work_per_s


@pytest.mark.parametrize(
    ("first", "last", "rate"),
    [((0, 0), (2, 500), 250), ((1, 400), (2, 500), 100), (None, (2, 500), None), ((2, 5), None, None)],
)
def test_a_rate_lies_between_two_samples(first, last, rate):
    first, last = (each and WorkSample(at_s=each[0], work=each[1]) for each in (first, last))
    assert work_per_s(first, last) == rate
    assert rate_before(first, last) == rate


def test_no_time_and_too_little_work_give_no_rate():
    then, now = WorkSample(at_s=1, work=100), WorkSample(at_s=2, work=199)
    assert work_per_s(now, now) is None
    assert work_per_s(then, now) == 99
    assert rate_before(then, now) is None


@pytest.mark.parametrize(
    ("before", "during", "lost"),
    [
        (100.0, 100.0, 0.0),
        (100.0, 25.0, 3.0),
        (100.0, 0.0, 4.0),
        (100.0, 125.0, -1.0),
        (None, 5.0, None),
        (100.0, None, None),
        (0.0, 0.0, None),
    ],
)
def test_lost_time_is_that_of_the_work_not_done(before, during, lost):
    assert lost_s(4.0, before, during) == lost
