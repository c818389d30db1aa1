"""Tests on real Xen, in its dom0: ``make test-xen`` runs them in an emulated machine."""

import os

import pytest
from xen_guests import MEMORY_BYTES, NAME, create, destroy_all, load_program, log_dirty_is_off, wait_for_work

from pageferry.core.errors import UnsupportedError
from pageferry.guests.boot import GuestParams
from pageferry.xen.domctl import Control
from pageferry.xen.store import XenStore


@pytest.fixture(scope="session")
def control():
    """Xen; without one the test is skipped, or fails where PAGEFERRY_REQUIRE_XEN is set."""
    try:
        made = Control()
    except UnsupportedError as error:
        if os.environ.get("PAGEFERRY_REQUIRE_XEN"):
            raise
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture(scope="session")
def store(control):
    """Its store."""
    with XenStore() as made:
        yield made


@pytest.fixture
def domain_name():
    """What the tests call their domain."""
    return NAME


@pytest.fixture
def own_name(worker):
    """A name for a domain of the test's own, which is destroyed afterwards: there is no other."""
    worker.end()
    yield NAME
    destroy_all()


class Worker:
    """A domain with a guest at work that checks itself: made by the first test, and used again while it is as it was.

    To make one takes longer than most tests. It has a quarter of a processor at most: what it computes is taken from
    dom0 where both are emulated.
    """

    def __init__(self, control, store, folder):
        self._control, self._store, self._folder = control, store, folder
        self._made = None

    def ready(self):
        """Its number, and its memory."""
        if self._made is None or not self._fit(self._made[0]):
            self.end()
            domid = create(self._folder, NAME, memory_mib=MEMORY_BYTES >> 20, more="cap = 25")
            params = GuestParams(working_set_bytes=4 << 20)
            memory, _ = load_program(self._control, domid, "kv", MEMORY_BYTES - (1 << 20), params=params)
            self._control.unpause(domid)
            self._made = domid, memory
        wait_for_work(self._made[1], 100)
        return self._made

    def _fit(self, domid):
        names = {
            each: self._store.read(f"/local/domain/{each}/name") for each in self._store.directory("/local/domain")
        }
        ours = {each: name for each, name in names.items() if name and name.startswith(NAME)}
        if ours != {str(domid): NAME}:
            return False
        info = self._control.info(domid)
        return not info.paused and info.shutdown_reason is None and log_dirty_is_off(self._control, domid)

    def end(self):
        """Destroy it, and all that came of it."""
        if self._made is not None:
            self._made[1].close()
            self._made = None
        destroy_all()


@pytest.fixture(scope="session")
def worker(control, store, tmp_path_factory):
    """Makes the domain of most tests."""
    made = Worker(control, store, tmp_path_factory.mktemp("worker"))
    yield made
    made.end()


@pytest.fixture
def working(worker):
    """A domain with a guest at work that checks itself: its number, and its memory."""
    return worker.ready()
