"""An undo log keeps others out, and what a killed process left behind is undone."""

import os
import subprocess
import sys
from contextlib import closing

import pytest
from fake_xen import FakePrivcmd

from pageferry.core.errors import UsageError
from pageferry.xen import uapi
from pageferry.xen import undo_log as module
from pageferry.xen.domctl import Control
from pageferry.xen.undo_log import open_undo_log, sweep, take_back


@pytest.fixture
def xen():
    return FakePrivcmd()


@pytest.fixture
def control(xen):
    return Control(xen)


def killed(folder, control, **steps):
    """Have a process note steps, and end without a word."""
    info = control.info(5)
    script = (
        "import os, sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from pageferry.xen.undo_log import open_undo_log\n"
        f"info = SimpleNamespace(domid=5, uuid={info.uuid!r})\n"
        f"open_undo_log(None, info, Path(sys.argv[1])).note(**{steps!r}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(folder)], check=False).returncode == 9


def test_the_second_is_refused_and_told_who_has_it(tmp_path, control):
    with closing(open_undo_log(control, control.info(5), tmp_path)) as mine:
        mine.note(log_dirty=1)
        with pytest.raises(UsageError, match=f"process {os.getpid()}, a pageferry, works on domain 5 already"):
            open_undo_log(control, control.info(5), tmp_path)
        mine.note(log_dirty=0)
    assert list(tmp_path.iterdir()) == []
    open_undo_log(control, control.info(5), tmp_path).close()


@pytest.mark.parametrize("step", [{"log_dirty": 1}, {"paused": 1}, {"suspended": 1}])
def test_what_could_not_be_undone_is_undone_by_the_next(tmp_path, xen, control, step):
    xen.log_dirty, xen.paused, xen.shutdown_reason = True, 1, uapi.SHUTDOWN_suspend
    with closing(open_undo_log(control, control.info(5), tmp_path)) as mine:
        mine.note(log_dirty=0, paused=0, suspended=0)
        mine.note(**step)
    left = {"log_dirty": xen.log_dirty, "paused": xen.paused, "suspended": xen.shutdown_reason is not None}
    assert left == {"log_dirty": True, "paused": 1, "suspended": True}
    assert sweep(control, tmp_path) == [5]
    now = {"log_dirty": xen.log_dirty, "paused": xen.paused, "suspended": xen.shutdown_reason is not None}
    assert now == left | dict.fromkeys(step, 0)
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_on_is_turned_off(tmp_path, xen, control):
    killed(tmp_path, control, log_dirty=1, paused=2, suspended=1)
    xen.log_dirty, xen.paused, xen.shutdown_reason = True, 2, uapi.SHUTDOWN_suspend
    assert sweep(control, tmp_path) == [5]
    assert (xen.log_dirty, xen.paused, xen.shutdown_reason) == (False, 0, None)
    assert list(tmp_path.iterdir()) == []
    assert sweep(control, tmp_path) == []


def test_what_was_undone_at_the_start_is_not_undone_again_by_the_next(tmp_path, xen, control):
    killed(tmp_path, control, log_dirty=1, paused=2)
    xen.paused = 2
    mine = open_undo_log(control, control.info(5), tmp_path)
    assert xen.paused == 0
    os.close(mine._fd)  # as a kill does, before there was anything to note
    xen.paused = 1  # by someone else
    assert sweep(control, tmp_path) == [5]
    assert xen.paused == 1


def test_what_was_undone_in_time_is_not_undone_again(tmp_path, xen, control):
    killed(tmp_path, control, log_dirty=0, paused=0, suspended=0)
    xen.log_dirty, xen.paused = True, 1  # by someone else
    sweep(control, tmp_path)
    assert (xen.log_dirty, xen.paused) == (True, 1)


def test_a_domain_that_has_its_number_since_is_left_alone(tmp_path, xen, control):
    (tmp_path / "xen-5-99999999-9999-9999-9999-999999999999.claim").write_text('{"log_dirty": 1}')
    xen.log_dirty = True
    assert sweep(control, tmp_path) == []
    assert xen.log_dirty
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_does_is_not_undone(tmp_path, xen, control):
    with closing(open_undo_log(control, control.info(5), tmp_path)) as mine:
        mine.note(log_dirty=1)
        xen.log_dirty = True
        assert sweep(control, tmp_path) == []
        assert xen.log_dirty


def test_one_whose_move_ended_without_an_answer_is_remembered(tmp_path, control):
    with closing(open_undo_log(control, control.info(5), tmp_path)) as mine:
        mine.note(suspended=1, given_away=1)
    with pytest.raises(UsageError, match="had no answer"):
        open_undo_log(control, control.info(5), tmp_path)
    (left,) = tmp_path.iterdir()
    left.unlink()  # as the hint says
    with closing(open_undo_log(control, control.info(5), tmp_path)) as mine:
        mine.note(suspended=1, given_away=1)
        mine.note(suspended=0, given_away=0)  # it came
    assert list(tmp_path.iterdir()) == []


def test_a_domain_that_was_given_away_is_not_undone_and_every_start_says_so(tmp_path, xen, control):
    killed(tmp_path, control, log_dirty=1, paused=1, suspended=1, given_away=1)
    xen.log_dirty, xen.paused, xen.shutdown_reason = True, 1, uapi.SHUTDOWN_suspend
    told = []
    for _ in range(2):
        assert sweep(control, tmp_path, tell=told.append) == []
        with pytest.raises(UsageError, match="was given to another host by a process that had no answer"):
            open_undo_log(control, control.info(5), tmp_path)
    assert (xen.log_dirty, xen.paused, xen.shutdown_reason) == (True, 1, uapi.SHUTDOWN_suspend)
    assert len(told) == 2
    assert "pageferry xen resume 5" in told[0]


def test_a_domain_that_surely_does_not_run_there_goes_on_here(tmp_path, xen, control):
    killed(tmp_path, control, log_dirty=1, paused=1, suspended=1, given_away=1)
    xen.log_dirty, xen.paused, xen.shutdown_reason = True, 1, uapi.SHUTDOWN_suspend
    take_back(control, control.info(5), tmp_path)
    assert (xen.log_dirty, xen.paused, xen.shutdown_reason) == (False, 0, None)
    with pytest.raises(UsageError, match="domain 5 was not given to another host"):
        take_back(control, control.info(5), tmp_path)


class Store:
    """What a guest was asked; it suspends itself when it is looked at, if it has taken the request."""

    def __init__(self, xen, *, taken):
        self.value, self._xen, self._taken = "" if taken else "suspend", xen, taken

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, path):
        assert path == "/local/domain/5/control/shutdown"
        if self._taken:
            self._xen.shutdown_reason = uapi.SHUTDOWN_suspend
        return self.value

    def write(self, path, value):
        self.value = value


@pytest.mark.parametrize("taken", [True, False])
def test_a_guest_that_was_asked_to_suspend_itself_is_waited_for_and_told(tmp_path, xen, control, monkeypatch, taken):
    killed(tmp_path, control, suspended=1, asked=60)
    store = Store(xen, taken=taken)
    monkeypatch.setattr(module, "XenStore", lambda: store)
    xen._getvcpucontext = xen._setvcpucontext = lambda request, u: None
    assert sweep(control, tmp_path) == [5]
    assert (xen.shutdown_reason, store.value) == (None, "")
    assert ("setvcpucontext" in xen.calls) is taken  # that it was cancelled


@pytest.mark.parametrize("cut", [1, 40])
def test_a_note_that_is_no_note_lets_no_domain_go_on(tmp_path, xen, control, cut):
    killed(tmp_path, control, log_dirty=1, paused=1, suspended=1, given_away=1)
    (left,) = tmp_path.iterdir()
    left.write_bytes(left.read_bytes()[:cut])
    xen.paused, xen.shutdown_reason = 1, uapi.SHUTDOWN_suspend
    sweep(control, tmp_path)
    assert (xen.paused, xen.shutdown_reason) == (1, uapi.SHUTDOWN_suspend)


def test_a_note_is_one_write_and_as_long_as_the_one_before(tmp_path, control):
    with closing(open_undo_log(control, control.info(5), tmp_path)) as mine:
        sizes = set()
        for steps in ({"name": "guest" * 100}, {"name": ""}, {"paused": 10}):
            mine.note(**steps)
            (file,) = tmp_path.iterdir()
            sizes.add(file.stat().st_size)
        mine.note(paused=0)
    assert len(sizes) == 1
