"""A guest's process that ends stays until the client that began a migration has asked how that ended."""

import threading

import pytest

from pageferry.core.policy_names import NO_USERS_POLICIES
from pageferry.vmm.accel import Accel, choose_machines
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.arguments import Arguments
from pageferry.vmm.attempts import asked_for
from pageferry.vmm.guest import Guest
from pageferry.vmm.outgoing import Outgoing

pytestmark = pytest.mark.parametrize("accel", ["soft"])


class Clients:
    """They do one thing after the other, each when it is asked whether they are there."""

    def __init__(self, *deeds):
        self.deeds = [*deeds]

    @property
    def connected(self):
        self.deeds.pop(0)()
        return True


def elsewhere(deed):
    """Have another thread do it: each client has a thread of its own."""
    thread = threading.Thread(target=deed)
    thread.start()
    thread.join()


@pytest.fixture
def outgoing(guests):
    """Of a small guest."""
    guest = Guest(choose_machines(Accel.SOFT), lambda _: None)
    guest.adopt(guests("idle"), "guest")
    return Outgoing(guest, Announcer(lambda _: None))


@pytest.fixture
def save(outgoing, tmp_path):
    """Saves that guest."""

    def begin():
        outgoing.begin(asked_for(f"file:{tmp_path}/guest.bin", Arguments({}), NO_USERS_POLICIES))

    return begin


def test_another_client_that_asks_first_does_not_end_the_wait(outgoing, save):
    save()
    outgoing.join()
    asked = []
    clients = Clients(lambda: elsewhere(outgoing.info), lambda: asked.append(outgoing.info()["status"]))
    outgoing.wait_until_told(clients)
    assert asked == ["completed"]


def test_a_client_whose_connection_is_gone_may_ask_on_another(outgoing, save):
    elsewhere(save)
    outgoing.join()
    clients = Clients(outgoing.info)
    outgoing.wait_until_told(clients)
    assert clients.deeds == []
