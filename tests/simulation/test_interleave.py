"""The explorer itself: it sees every order, and tells which one breaks a promise."""

from math import comb

import pytest

from pageferry.hypervisor.locks import DomainLocks, LockOrderError
from simulation.interleave import Explored, ScheduledLock, Violated, explore, note, step


class Toy:
    """Actors over one dictionary."""

    def __init__(self, *bodies, check=lambda shared: None):
        self.shared = {"n": 0, "order": ""}
        self.locks = [ScheduledLock("a"), ScheduledLock("b")]
        self._bodies = bodies
        self._check = check

    def actors(self):
        return [(f"actor{n}", lambda body=body: body(self)) for n, body in enumerate(self._bodies)]

    def check(self):
        self._check(self.shared)

    def finished(self):
        return False

    def fingerprint(self):
        return tuple(self.shared.values()), tuple(lock.held for lock in self.locks)

    def close(self):
        pass


def writer(letter, times):
    def body(toy):
        for _ in range(times):
            step(letter)
            toy.shared["order"] += letter

    return body


def test_every_order_of_steps_is_taken():
    ends = []

    class Ending(Toy):
        def close(self):
            ends.append(self.shared["order"])

    explored = explore(lambda: Ending(writer("x", 3), writer("y", 3)))
    whole = [order for order in ends if len(order) == 6]
    assert len(set(whole)) == comb(6, 3)
    assert isinstance(explored, Explored)
    assert explored.schedules >= comb(6, 3)


def increment(toy):
    step("read")
    n = toy.shared["n"]
    step("write")
    toy.shared["n"] = n + 1


def increment_on_the_stack(toy):
    class Number:
        def __getitem__(self, _):
            step("read")
            note(toy.shared["n"])
            return toy.shared["n"]

        def __setitem__(self, _, value):
            step("write")
            toy.shared["n"] = value

    number = Number()
    number[0] += 1


def locked_increment(toy):
    toy.locks[0].acquire()
    increment(toy)
    toy.locks[0].release()


def counted(final):
    def body(toy):
        step("look", lambda: toy.shared["order"] == "xx")
        if toy.shared["n"] != final:
            raise Violated(f"lost update: {toy.shared['n']}")

    return body


def then_done(body):
    def both(toy):
        body(toy)
        toy.shared["order"] += "x"

    return both


@pytest.mark.parametrize("body", [increment, increment_on_the_stack])
def test_a_lost_update_is_found_with_its_schedule(body):
    with pytest.raises(Violated, match="lost update: 1") as caught:
        explore(lambda: Toy(then_done(body), then_done(body), counted(2)))
    assert caught.value.schedule.index("actor1: read") < caught.value.schedule.index("actor0: write")


def test_a_lock_makes_it_one_step():
    assert explore(lambda: Toy(then_done(locked_increment), then_done(locked_increment), counted(2))).schedules > 1


def nested(first, second):
    def body(toy):
        for lock in (first, second):
            toy.locks[lock].acquire()
        for lock in (first, second):
            toy.locks[lock].release()

    return body


def test_a_deadlock_is_found():
    assert explore(lambda: Toy(nested(0, 1), nested(0, 1))).schedules > 1
    with pytest.raises(Violated, match="deadlock: actor0 at lock b, actor1 at lock a"):
        explore(lambda: Toy(nested(0, 1), nested(1, 0)))


def test_the_order_of_locks_turns_that_deadlock_into_an_error():
    def body(order):
        def take(toy):
            with locks[order[0]], locks[order[1]]:
                pass

        return take

    ordered = DomainLocks()
    locks = {"p2m": ordered.p2m, "log_dirty": ordered.log_dirty}

    def world():
        toy = Toy(body(("p2m", "log_dirty")), body(("log_dirty", "p2m")))
        ordered.p2m.instrument(lambda _: toy.locks[0])
        ordered.log_dirty.instrument(lambda _: toy.locks[1])
        return toy

    with pytest.raises(LockOrderError, match="P2M lock taken while holding LOG_DIRTY"):
        explore(world)


def test_a_check_sees_the_states_in_between():
    def never_one(shared):
        if shared["n"] == 1:
            raise Violated("n is 1")

    def twice(toy):
        for _ in range(2):
            step("add")
            toy.shared["n"] += 1

    with pytest.raises(Violated, match="n is 1"):
        explore(lambda: Toy(twice, check=never_one))


def test_an_exploration_is_the_same_every_time():
    def world():
        return Toy(then_done(increment), then_done(increment_on_the_stack), writer("y", 2))

    assert explore(world) == explore(world) == explore(world)


def test_steps_outside_an_exploration_do_nothing():
    step("here", lambda: False)
    lock = ScheduledLock("free")
    assert lock.acquire()
    lock.release()
    assert not lock.held
