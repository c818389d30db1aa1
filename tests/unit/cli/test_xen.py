"""What the commands of Xen refuse, and how they say it; what log-dirty shows."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from pageferry.cli.commands.xen import _print_rows, _watch
from pageferry.cli.xen_source import _run
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import UnsupportedError
from pageferry.engine.handoff.custody import Handoff
from pageferry.xen.domctl import Control


@pytest.fixture
def no_xen():
    """Only for hosts that do not run on Xen."""
    try:
        Control().close()
    except UnsupportedError:
        return
    pytest.skip("this host runs on Xen")


@pytest.mark.parametrize(
    "arguments",
    [
        ("xen", "list"),
        ("xen", "log-dirty", "1"),
        ("save", "xen:1", "file"),
        ("migrate", "xen:1", "ssh://host"),
        ("migrate", "xen:1", "--through", "ssh host xl migrate-receive"),
    ],
)
def test_a_host_without_xen_is_told_so(here, no_xen, arguments):
    result = here(*arguments)
    assert result.returncode == 5
    assert result.stderr.startswith("pageferry: ")
    assert "xen" in result.stderr.lower()
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--hold",), "--hold"),
        (("--recover",), "--recover"),
        (("--verify", "full"), "--verify"),
        (("--connections", "4"), "--connections"),
        (("--compress", "lz4", "--delta-cache", "64M"), "--compress, --delta-cache"),
        (("--tls-dir", "x"), "--tls-dir"),
        (("--peer", "x"), "--peer"),
        (("--secret-file", "x"), "--secret-file"),
        (("--insecure",), "--insecure"),
    ],
)
def test_what_only_another_pageferry_understands_is_refused_for_a_domain(here, options, says):
    result = here("migrate", "xen:1", "ssh://host", *options)
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert first == f"pageferry: {says}: not for a domain of Xen"
    assert second.startswith("hint: leave ")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("save", "xen:1", "file", "--control", "x"), "a domain of Xen has no control socket"),
        (("save", "guest", "file"), "guest is no guest"),
        (("save", "file"), "no guest was given: --control is missing"),
        (("migrate", "xen:1"), "no destination was given"),
        (("migrate", "xen:1", "ssh://host", "--through", "x"), "a destination was given twice"),
        (("migrate", "xen:1", "tcp://host:1"), "tcp://host:1 is no address of another dom0"),
        (("migrate", "tcp://host:1"), "no guest was given: --control is missing"),
        (("migrate", "tcp://host:1", "ssh://host"), "tcp://host:1 is no domain"),
        (("xen",), "Missing command"),
        (("xen", "nonsense"), "No such command 'nonsense'"),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint(here, arguments, why):
    result = here(*arguments)
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert why in first
    assert second.startswith("hint: ")


class Log:
    def __init__(self):
        self.enabled, self.rounds = False, iter([3, 0, 700])

    def enable(self):
        self.enabled = True

    def clean(self):
        return DirtyBitmap.of(1000, np.arange(next(self.rounds)))


def requests(*answers):
    left = iter(answers)
    return SimpleNamespace(wait=lambda s: next(left))


def test_each_round_tells_what_was_written_in_it():
    guest = SimpleNamespace(log_dirty=Log())
    seen = list(_watch(guest, 3, 0.5, requests(False, False, False)))
    assert [each["dirty_pages"] for each in seen] == [3, 0, 700]
    assert [each["index"] for each in seen] == [0, 1, 2]
    assert seen[0]["dirty_bytes_per_s"] == pytest.approx(3 * 4096 / seen[0]["duration_s"])


def test_a_signal_ends_it_after_the_round_before():
    assert len(list(_watch(SimpleNamespace(log_dirty=Log()), 3, 0.5, requests(False, True)))) == 1


class Attempt:
    """Runs until it was asked to end as often as it can be."""

    def __init__(self, file, signals, steps):
        self._handoff = handoff = Handoff()
        for step in steps:
            getattr(handoff, step)()
        self._left = threading.Semaphore(0)
        self._signals = signals
        report = SimpleNamespace(status="completed", to_json=lambda: {"status": "completed"})
        self.job = SimpleNamespace(
            handoff=handoff, cancel=self._cancel, file=file, guest_at=handoff.guest_at, report=report
        )

    def _cancel(self):
        self._left.release()
        return self._handoff.cancel()

    def run(self):
        for _ in range(self._signals):
            assert self._left.acquire(timeout=60)


ASKED = ["cancelling", "cancelling: the outcome is waited for"]
HANDED_OVER = ["too late to cancel: the domain is being handed over, and the answer is waited for"]


@pytest.mark.parametrize(
    ("file", "steps", "says"),
    [
        (None, (), ASKED),
        ("guest.xl", (), ASKED),
        (None, ("commit",), HANDED_OVER * 2),
        (None, ("commit", "running"), ["too late to cancel: the domain runs at the destination"]),
        ("guest.xl", ("keep",), ["too late to cancel: the file is whole"]),
    ],
)
def test_each_signal_is_answered(file, steps, says):
    shown = []
    waiting = iter([True] * len(says))
    noted = SimpleNamespace(wait=lambda s: next(waiting, False), take=lambda: 1)
    report = _run(Attempt(file, len(says), steps), shown.append, lambda: nullcontext(noted))
    assert report == {"status": "completed"}
    assert shown == [{"type": "Notice", "text": text} for text in says]


def test_each_row_of_the_list_is_one_line_however_long_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    by = "on, by process 484, xl migrate " + "x" * 80
    _print_rows([["id", "name", "log-dirty", "writes"], ["4", "guest", by, "1 MiB/s"]])
    first, second = capsys.readouterr().out.splitlines()
    assert second == f"4   guest  {by}  1 MiB/s"
    assert first.index("writes") == second.index("1 MiB/s")
