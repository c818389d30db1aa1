"""The first signal ends a command, or is noted; those after it change nothing."""

import os
import signal

import pytest
from ended_command import ending

from pageferry.cli import signals


def hit(number):
    os.kill(os.getpid(), number)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_what_needs_no_care_and_the_second_changes_nothing(capfd, number):
    undone = []

    def command():
        try:
            hit(number)
        finally:
            for other in SIGNALS:
                hit(other)
            undone.append(True)

    assert ending(command) == 130
    assert undone == [True]
    assert capfd.readouterr().err == "pageferry: ending already\n" * 3 + "pageferry: interrupted\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_noted_signals_and_those_after_them_change_nothing(number):
    taken = []

    def command():
        with signals.SIGNALS.noted() as requests:
            hit(number)
            hit(number)
            taken.append(requests.take())
            taken.append(requests.take())
        hit(number)

    assert ending(command) == 0
    assert taken == [2, 0]


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ending(lambda: hit(signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    ending(lambda: None)
    assert [signal.getsignal(number) for number in SIGNALS] == before
