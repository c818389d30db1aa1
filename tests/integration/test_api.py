"""What ``pageferry`` exports moves, saves and restores guests, and nothing has to be done besides."""

import ast
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from at_work import runs_on

import pageferry
from pageferry.core.events import PostcopyPaused, PostcopyProgress, PostcopyRecovered
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import Action, Decision

MiB = 1 << 20
HERE = "tcp://127.0.0.1:0"
#: Memory that no guest here uses: 4 MiB.
LATE_GPA, LATE_PAGES = 24 * MiB, 1024
LATE = np.arange(LATE_PAGES, dtype=np.uint64).repeat(PAGE_SIZE // 8).tobytes()


class Switch:
    """One round, in which ``LATE`` is written, then post-copy."""

    name = "switch"
    switches = True

    def __init__(self, vm):
        self.vm = vm

    def decide(self, progress):
        self.vm.memory.write(LATE_GPA, LATE)
        return Decision(action=Action.POST_COPY, reason="so")


class Recorded(pageferry.Acceptor):
    """Remembers who came to it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.callers = []

    def wait(self):
        self.callers.append(super().wait())
        return self.callers[-1]


@pytest.fixture
def machines(accel):
    return pageferry.choose_machines(accel)


@pytest.fixture
def guest(machines):
    vm = pageferry.boot("kv", machines, memory_bytes=32 * MiB, params=pageferry.GuestParams(working_set_bytes=MiB))
    vm.resume()
    assert runs_on(vm)
    yield vm
    vm.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def acceptor(pool):
    with Recorded(HERE) as place:
        yield place


def test_a_guest_switches_and_its_source_is_let_go(pool, acceptor, guest, machines):
    arrival = pool.submit(pageferry.receive, acceptor, machines)
    report = pageferry.migrate(guest, str(acceptor.endpoint), Switch(guest))
    vm = arrival.result()
    assert report.guest_at is pageferry.GuestAt.DESTINATION
    assert report.postcopy.missing_pages >= LATE_PAGES
    assert vm.memory.read(LATE_GPA, len(LATE)) == LATE
    assert runs_on(vm)
    vm.close()


def test_a_source_that_is_cut_after_the_switch_comes_back_by_itself(pool, acceptor, guest, machines):
    events = []

    def cut_once(event):
        if isinstance(event, PostcopyProgress) and not events:
            acceptor.callers[0].channel.abort()
        if isinstance(event, PostcopyProgress | PostcopyPaused | PostcopyRecovered):
            events.append(type(event))

    arrival = pool.submit(pageferry.receive, acceptor, machines)
    report = pageferry.migrate(guest, acceptor.endpoint, Switch(guest), on_event=cut_once)
    vm = arrival.result()
    assert {PostcopyPaused, PostcopyRecovered} <= set(events)
    assert report.postcopy.cuts >= 1
    assert vm.memory.read(LATE_GPA, len(LATE)) == LATE
    assert runs_on(vm)
    vm.close()


def test_a_failed_attempt_leaves_the_guest_here_and_the_next_one_works(pool, acceptor, guest, machines):
    class Refusing(Switch):
        def decide(self, progress):
            return Decision(action=Action.ABORT, reason="not today")

    arrival = pool.submit(pageferry.receive, acceptor, machines)
    with pytest.raises(pageferry.MigrationError, match="not today") as failed:
        pageferry.migrate(guest, acceptor.endpoint, Refusing(guest))
    assert failed.value.guest_at is pageferry.GuestAt.SOURCE
    with pytest.raises(pageferry.MigrationError):
        arrival.result()
    assert runs_on(guest)
    arrival = pool.submit(pageferry.receive, acceptor, machines)
    assert pageferry.migrate(guest, acceptor.endpoint).verified
    arrival.result().close()


def test_receiving_is_ended_by_closing_the_listener(pool, acceptor, machines):
    arrival = pool.submit(pageferry.receive, acceptor, machines)
    with pytest.raises(pageferry.UsageError, match="cannot listen at"):
        pageferry.Acceptor(acceptor.endpoint)
    acceptor.close()
    acceptor.close()
    assert acceptor.closed
    with pytest.raises(ConnectionAbortedError, match="no longer listening"):
        arrival.result()
    with pytest.raises(ConnectionAbortedError):
        acceptor.accept(0)


def test_a_guest_is_told_of_before_it_runs(pool, acceptor, guest, machines):
    met = []
    options = pageferry.MigrationOptions(name="sheep")
    arrival = pool.submit(
        pageferry.receive, acceptor, machines, before_run=lambda vm, name: met.append((vm, name, vm.status))
    )
    pageferry.migrate(guest, acceptor.endpoint, options=options)
    assert met == [(arrival.result(), "sheep", pageferry.VmStatus.PAUSED)]
    arrival.result().close()


def test_a_guest_is_saved_and_restored(tmp_path, guest, machines):
    report = pageferry.save(guest, tmp_path / "kv.bin")
    assert report.guest_at is pageferry.GuestAt.SOURCE
    assert report.verified_pages
    assert runs_on(guest)
    again = pageferry.restore(tmp_path / "kv.bin", machines)
    assert again.status is pageferry.VmStatus.PAUSED
    again.resume()
    assert runs_on(again)
    again.close()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda _: pageferry.choose_machines("xen"), "no machine 'xen'"),
        (lambda machines: pageferry.boot("nothing", machines), "unknown workload"),
        (lambda machines: pageferry.restore("/no/such/file", machines), "/no/such/file"),
        (lambda _: pageferry.make_policy("later"), "unknown policy"),
        (lambda _: pageferry.Endpoint.parse("ftp://x"), "not an address"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, said, machines):
    with pytest.raises(pageferry.UsageError, match=said):
        call(machines)


# -- the names ---------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_type_checkers_see_it():
    for name in pageferry.__all__:
        assert getattr(pageferry, name) is not None
    assert set(pageferry.__all__) <= set(dir(pageferry))
    with pytest.raises(AttributeError, match="no attribute 'ferry'"):
        _ = pageferry.ferry
    tree = ast.parse(Path(pageferry.__file__).read_text())
    for_checkers = {
        (node.module, name.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for name in node.names
    }
    at_run_time = {(f"pageferry.{module}", name) for module, names in pageferry._MODULES.items() for name in names}
    assert for_checkers == at_run_time
    assert {name for _, name in at_run_time} == {*pageferry.__all__} - {"__version__"}


def test_the_docstring_names_every_public_name():
    assert [name for name in pageferry.__all__ if name not in pageferry.__doc__ and name != "__version__"] == []


def test_importing_pageferry_loads_nothing_of_it():
    code = "import sys, pageferry; print(*(name for name in sys.modules if name.startswith(('pageferry', 'numpy'))))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(loaded) == ["pageferry", "pageferry.core", "pageferry.core.version"]
