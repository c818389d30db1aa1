"""Interrupted: a call is stopped before each of its steps in turn, and another is made there."""

import threading

import pytest

from pageferry.testing.steps import Interrupted, called_by


class Counter:
    """A number that a call changes in two steps."""

    def __init__(self):
        self.number = 0
        self.lock = threading.Lock()

    def add(self):
        self.number = self.number + 1

    def add_locked(self):
        with self.lock:
            self.add()


def explore(first_of, second_of):
    """Interrupt a fresh counter's call at each step; return what it came to each time, and where."""
    seen = []
    while True:
        counter = Counter()
        race = Interrupted(first_of(counter), second_of(counter), len(seen), done=lambda _: None)
        race.run()
        if race.place is None:
            return seen
        seen.append((counter.number, race.place))


def test_a_lost_update_is_found_at_the_step_that_allows_it():
    seen = explore(lambda counter: counter.add, lambda counter: counter.add)
    assert [number for number, _ in seen] == [2, 1, 1]
    assert all(place.startswith("Counter.add (test_steps.py:") for _, place in seen)


def test_a_second_call_that_waits_for_the_first_lets_it_go_on():
    seen = explore(lambda counter: counter.add_locked, lambda counter: counter.add_locked)
    assert len(seen) > 3
    assert {number for number, _ in seen} == {2}


def test_what_the_first_returned_is_handed_on_at_once():
    got = []
    race = Interrupted(lambda: "result", lambda: got.append("second"), 10**6, done=got.append)
    race.run()
    assert (got, race.place) == (["result"], None)


@pytest.mark.parametrize("at", [0, 10**6])
def test_an_error_of_either_call_comes_out(at):
    def fail():
        raise OSError("no")

    counter = Counter()
    calls = (counter.add, fail) if at == 0 else (fail, counter.add)
    with pytest.raises(OSError, match="no"):
        Interrupted(*calls, at, done=lambda _: None).run()


def test_the_functions_that_a_call_calls_are_named():
    assert "add" in called_by(Counter().add_locked)
    assert "add_locked" not in called_by(Counter().add)
