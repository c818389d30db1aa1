import base64
import queue

import pytest

from pageferry.cli.linux_work import LinuxWork
from pageferry.core.errors import VmError


class Followed:
    """The control connection of a process whose guest says what the test has it say."""

    def __init__(self):
        self._events = queue.Queue()

    def execute(self, command):
        assert command == "x-console-follow"

    def says(self, text, end=None):
        data = {"output": base64.b64encode(text.encode()).decode(), "dropped": 0, "end": end}
        self._events.put({"event": "STOP", "data": {}})
        self._events.put({"event": "X_PAGEFERRY_CONSOLE", "data": data})

    def breaks(self):
        self._events.put(None)

    def events(self):
        while (event := self._events.get()) is not None:
            yield event
        raise VmError("the guest process went away")


@pytest.fixture
def source():
    return Followed()


@pytest.fixture
def shown():
    return []


@pytest.fixture
def work(source, shown):
    work = LinuxWork(shown.append)
    work.follow("source", source)
    return work


def test_rounds_are_counted_from_process_to_process_and_each_line_is_shown_once(work, source, shown):
    source.says("pageferry: ready\r\nwork: round 1\r\nwork: rou")
    assert work.wait_for_rounds(1) == 1
    source.says("", end="the guest has moved")
    destination = Followed()
    work.follow("destination", destination)
    destination.says("nd 2\r\nwork: round 3\r\n")
    assert work.wait_for_rounds(3) == 3
    assert shown == [
        "     source │ pageferry: ready",
        "     source │ work: round 1",
        "destination │ work: round 2",
        "destination │ work: round 3",
    ]


def test_what_the_guest_finds_wrong_is_told(work, source):
    source.says("work: round 1\r\nwork: WRONG in round 1: a sum\r\n")
    with pytest.raises(VmError, match="does not go on: work: WRONG in round 1: a sum"):
        work.wait_for_rounds(2)


def test_a_guest_that_ends_is_not_waited_for(work, source):
    source.says("", end="the guest crashed: triple fault")
    with pytest.raises(VmError, match="does not go on: the guest crashed"):
        work.wait_for_rounds(1)


def test_a_process_that_goes_away_is_not_waited_for(work, source):
    source.breaks()
    with pytest.raises(VmError, match="went away"):
        work.wait_for_rounds(1)
