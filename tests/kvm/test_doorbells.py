"""KVM's doorbells: a guest's store signals an eventfd, and reaches no device."""

import os

import pytest

from pageferry.core.vm import GuestEnd
from pageferry.kvm.doorbells import doorbells_of

pytestmark = pytest.mark.kvm

#: In the PCI hole, where no device is.
BELL_GPA, OTHER_GPA = 0xE000_3000, 0xE000_3004


class Notified:
    """Takes stores around the bells."""

    name = "notified"
    ports = range(0)
    mmio = range(0xE000_3000, 0xE000_4000)

    def __init__(self):
        self.stores = []

    def read(self, offset, size):
        return 0

    def write(self, offset, size, value):
        self.stores.append((offset, value))

    def save(self):
        return b""

    def load(self, data):
        pass


@pytest.fixture
def bell():
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield event
    os.close(event)


def test_a_store_rings_the_bell_and_reaches_no_device(kvm, bell):
    notified = Notified()
    # Three stores of 8 bytes: at two bells, then where none is.
    vm = kvm.guest("touch", devices=(notified,), rdi=BELL_GPA, rsi=OTHER_GPA, rbp=BELL_GPA + 8, r8=5)
    doorbells = doorbells_of(vm.vm_fd)
    if doorbells is None:
        pytest.skip("this KVM has no doorbells")
    assert doorbells.install(BELL_GPA, bell)
    assert doorbells.install(OTHER_GPA, bell)
    assert not doorbells.install(BELL_GPA, bell), "there is one"
    doorbells.remove(OTHER_GPA, bell)
    vm.resume()
    vm.wait(60)
    assert vm.end == GuestEnd(exit_code=0)
    assert os.eventfd_read(bell) == 1
    assert notified.stores == [(4, 5), (8, 5)]
