import os

import pytest

from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.errors import UnsupportedError, UsageError, VmError
from pageferry.core.hostmem import MemFd, available_bytes, total_bytes
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import VmConfig
from pageferry.engine import features
from pageferry.engine.room import GuestLimits, expect_more_room, make_machine, stated_pages
from pageferry.hypervisor.domain import Domain
from pageferry.stream.ferry_frames import SourceHello

MiB = 1 << 20


def hello(**fields):
    what = {"version": "1", "memory_bytes": 32 * MiB, "cpus": 1, "accel": "soft", "cpuid": SOFT_CPU}
    return SourceHello(**{**what, "migration_id": "x", **fields})


class Handed:
    """A channel with a descriptor on it."""

    def __init__(self, fd=None):
        self.fd = fd

    def take_fd(self):
        fd, self.fd = self.fd, None
        return fd


@pytest.mark.parametrize(
    ("said", "runs", "stated"),
    [(0, ((0, 786_432),), 786_432), (5, ((0, 2), (9, 4)), 6), (7, ((0, 2),), 7), (0, (), 0)],
)
def test_a_guest_holds_no_fewer_pages_than_its_source_names(said, runs, stated):
    assert stated_pages(hello(populated_pages=said, populated=runs)) == stated


def test_a_guest_that_says_that_it_holds_nothing_and_names_more_than_there_is_has_no_room():
    made = []

    def make(config):
        made.append(Domain(config))
        return made[-1]

    pages = total_bytes() // 4096 + 1
    with pytest.raises(UsageError, match="this host has"):
        make_machine(hello(populated_pages=0, populated=((0, pages),)), Handed(), make)
    assert made[0].closed


def handed_over(size_bytes):
    file = MemFd("test", size_bytes)
    return os.dup(file.fd)


def refuse(config):
    raise VmError("no")


@pytest.mark.parametrize(
    ("memory_bytes", "make"),
    [(32 * MiB, refuse), (64 * MiB, Domain)],
    ids=["no such machine", "another size"],
)
def test_memory_that_was_handed_over_and_is_not_used_is_closed(memory_bytes, make):
    channel = Handed(fd := handed_over(32 * MiB))
    with pytest.raises((UsageError, VmError)) as failed:
        make_machine(hello(memory_bytes=memory_bytes, features=(features.SHARED_MEMORY,)), channel, make)
    assert not isinstance(failed.value, UnsupportedError)
    assert channel.fd is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_guest_of_no_possible_size_leaves_what_was_handed_over_to_the_channel():
    channel = Handed(fd := handed_over(32 * MiB))
    with pytest.raises(UsageError, match="not possible"):
        make_machine(hello(memory_bytes=4096, features=(features.SHARED_MEMORY,)), channel, refuse)
    assert channel.fd == fd
    os.close(fd)


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        (GuestLimits(), None),
        (GuestLimits(memory_bytes=64 * MiB, cpus=4), None),
        (GuestLimits(memory_bytes=32 * MiB), "64.* of memory, and 32.* at the most"),
        (GuestLimits(cpus=3), "4 vCPUs, and 3 at the most"),
    ],
)
def test_a_guest_larger_than_its_host_takes_is_refused(limits, refused):
    config = VmConfig(memory_bytes=64 * MiB, cpus=4)
    if refused is None:
        limits.check(config)
        return
    with pytest.raises(UsageError, match=refused) as failed:
        limits.check(config)
    assert "--max-" in failed.value.hint


def test_the_host_tells_what_it_has():
    assert total_bytes() > available_bytes()


def test_a_host_that_runs_out_of_memory_while_a_guest_arrives_ends_it():
    memory = GuestMemory.linear(2 * MiB)
    for has in (None, 1 << 40):
        expect_more_room(memory, lambda has=has: has)
    with pytest.raises(UsageError, match="of memory left while the guest arrives"):
        expect_more_room(memory, lambda: MiB)
    memory.close()
