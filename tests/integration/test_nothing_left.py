"""Law 9: attempts that fail, of every kind and in any number, leave no memory, descriptor or thread behind."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from at_work import until

from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.hostmem import MemFd
from pageferry.engine import features
from pageferry.engine.wire.peer import Peer, PeerFailedError
from pageferry.stream.encoder import Encoder
from pageferry.stream.ferry_frames import DestinationHello, Join, Recover, SourceHello
from pageferry.stream.ferry_order import Side
from pageferry.stream.records import CpuidPolicy, StaticDataEnd

TIMEOUT_S = 60
MiB = 1 << 20
FIELDS = {"version": "1", "memory_bytes": 16 * MiB, "cpus": 1, "accel": "soft", "cpuid": SOFT_CPU, "migration_id": "x"}
HELLO = SourceHello(**FIELDS, populated=((0, 4096),), populated_pages=4096)


def silent(_):
    """Connect, and leave."""


def noise(channel):
    channel.send([b"GET / HTTP/1.1\r\n\r\n"])
    channel.receive_some(1)


def half(channel):
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    channel.send([b"\1\0"])


class BusyError(Exception):
    """The attempt before this one is not over yet."""


def answer(channel, frame, fd=None):
    """Say something first; return the peer and what it answers, which may be its refusal."""
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    peer.send(frame, fd)
    try:
        return peer, peer.receive()
    except PeerFailedError as error:
        if "another guest is being received" in str(error):
            raise BusyError from error
        return peer, error


def refused(channel, frame, fd=None):
    assert isinstance(answer(channel, frame, fd)[1], PeerFailedError)


def too_large(channel):
    refused(channel, SourceHello(**{**FIELDS, "memory_bytes": 64 * MiB}))


def no_such_cpu(channel):
    refused(channel, SourceHello(**{**FIELDS, "cpus": 1000}))


def joins(channel):
    refused(channel, Join(proof="x", index=1))


def comes_back(channel):
    refused(channel, Recover(proof="x"))


def accepted(channel):
    peer, said = answer(channel, HELLO)
    assert isinstance(said, DestinationHello)
    return peer


def stream(*pages):
    encoder = Encoder()
    begin = encoder.header(), encoder.record(CpuidPolicy(leaves=SOFT_CPU)), encoder.record(StaticDataEnd())
    gfns = np.array(pages, np.uint64)
    inside = gfns[gfns < 4096]
    return [*begin, encoder.page_data(gfns), bytes(inside.size * 4096) or b""]


def leaves_after_the_answer(channel):
    accepted(channel)


def leaves_in_the_middle(channel):
    accepted(channel)
    channel.send(stream(*range(256, 768)))


def a_page_outside(channel):
    peer = accepted(channel)
    channel.send(stream(4096))
    with pytest.raises(PeerFailedError):
        peer.receive()


TCP = [silent, noise, half, too_large, no_such_cpu, joins, comes_back]
TCP += [leaves_after_the_answer, leaves_in_the_middle, a_page_outside]


def memory_of_another_size(channel):
    file = MemFd("test", 8 * MiB)
    refused(channel, SourceHello(**FIELDS, features=(features.SHARED_MEMORY,)), file.fd)
    file.close()


def many_descriptors(channel):
    for _ in range(20):
        channel.send([b"\x89"], 0)


def a_descriptor_for_nothing(channel):
    file = MemFd("test", 16 * MiB)
    assert isinstance(answer(channel, HELLO, file.fd)[1], DestinationHello)
    file.close()


UNIX = [silent, leaves_in_the_middle, memory_of_another_size, many_descriptors, a_descriptor_for_nothing]


class Weighed:
    """What a process holds."""

    def __init__(self, pid):
        self._proc = Path("/proc") / str(pid)

    def descriptors(self):
        return len(os.listdir(self._proc / "fd"))

    def threads(self):
        return len(os.listdir(self._proc / "task"))

    def memory_bytes(self):
        lines = dict(line.split(":", 1) for line in (self._proc / "status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) << 10


@pytest.mark.exhaustive("a thousand attempts take a minute; that each closes what it opened is tested one by one")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kinds", [TCP, UNIX], ids=["tcp", "unix"])
def test_a_thousand_failed_attempts_leave_nothing(start, process_accel, tmp_path, dice, kinds):
    uri = "tcp://127.0.0.1:0" if kinds is TCP else f"unix:{tmp_path / 'wire'}"
    there = start("receive", uri, "--accel", process_accel, "--max-memory", "32M")
    endpoint, weighed = there.endpoint(), Weighed(there.popen.pid)

    def attempts(count):
        for kind in dice.choices(kinds, k=count):
            while not attempted(kind):
                pass

    def attempted(kind):
        channel = endpoint.connect(TIMEOUT_S)
        try:
            with contextlib.suppress(OSError):
                kind(channel)
        except BusyError:
            return False
        finally:
            channel.close()
        return True

    def settled():
        """What it holds when it has nothing to do: the attempt and the callers are over."""
        until(lambda: attempted(too_large), "end of the last attempt, and of its machine")
        until(lambda: weighed.threads() <= idle_threads, lambda: f"rest: {weighed.threads()} threads", 0.05)
        return weighed.descriptors(), weighed.memory_bytes()

    idle_threads = weighed.threads()
    attempts(100)
    before = settled()
    attempts(1000)
    after = settled()
    until(lambda: weighed.descriptors() <= before[0], lambda: f"end of {weighed.descriptors()} descriptors", 0.05)
    assert after[1] < before[1] + 8 * MiB
    assert there.status() == "inmigrate"
    source = start("run", "kv", "--accel", process_accel, "--memory", "16M", "--working-set", "1M", name="source")
    source.ask("migrate", uri=str(endpoint))
    there.until(lambda: there.status() == "running", "guest")
