"""Lanes: what is said on a connection is said in order, whichever thread says it."""

import threading

import numpy as np
import pytest

from pageferry.core.frames import PAGES_PER_2M
from pageferry.core.memory import GuestMemory
from pageferry.engine.host import Host
from pageferry.engine.pages.encode import PlainCoder
from pageferry.engine.pages.send import Lane, Lanes
from pageferry.engine.verify.digests import RunDigests, digest_runs
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import EXTENSIONS
from pageferry.stream.order import Role
from pageferry.stream.records import StaticDataEnd

GIVE_UP_S = 60.0
#: How long a thread that does not wait its turn has to show it.
WINDOW_S = 0.2


class Outlet:
    """Takes what is sent; ``overtaken`` is set when a second thread begins before the first has done."""

    pacer = None

    def __init__(self):
        self.sent_bytes = 0
        self.calls = []
        self.sending = threading.Lock()
        self.entered, self.overtaken, self.may_go = threading.Event(), threading.Event(), threading.Event()
        self.may_go.set()

    def send(self, buffers):
        data = b"".join(map(bytes, buffers))
        if not self.sending.acquire(blocking=False):
            self.overtaken.set()
            self.sending.acquire()
        self.entered.set()
        assert self.may_go.wait(GIVE_UP_S)
        self.calls.append(data)
        self.sent_bytes += len(data)
        self.sending.release()

    def abort(self):
        self.may_go.set()

    def close(self):
        pass


@pytest.fixture
def memory():
    made = GuestMemory.linear(8 << 20)
    yield made
    made.close()


@pytest.fixture
def lanes(memory):
    outlets = [Outlet(), Outlet()]
    made = []
    for outlet in outlets:
        encoder = Encoder(Role.SECTION)
        outlet.send([encoder.header(agreed=EXTENSIONS), encoder.record(StaticDataEnd())])
        coder = PlainCoder(memory, encoder)
        made.append(Lane(memory, outlet, encoder, coder, says_zero=False, on_sent=lambda gfns: None))
    lanes = Lanes(made[0], made[1:])
    yield lanes, outlets
    lanes.close()


@pytest.mark.parametrize("say", ["send_fence", "send_removed", "finish"])
def test_nothing_overtakes_what_another_thread_still_sends(memory, lanes, say):
    lanes, (_, second) = lanes
    first_gfns = np.array([PAGES_PER_2M], np.uint64)  # of the second connection
    pages = np.array([1], np.uint64)
    memory.write(PAGES_PER_2M << 12, b"content")
    second.entered.clear()
    second.may_go.clear()
    before = len(second.calls)
    digests = RunDigests(first_gfns=first_gfns, pages=pages, digests=digest_runs(memory, first_gfns, pages))
    lanes.send_audit(digests)
    assert second.entered.wait(GIVE_UP_S)
    arguments = {"send_fence": (7,), "send_removed": (first_gfns,), "finish": ()}[say]
    speaking = threading.Thread(target=getattr(lanes, say), args=arguments)
    speaking.start()
    second.overtaken.wait(WINDOW_S)
    second.may_go.set()
    speaking.join(GIVE_UP_S)
    assert not second.overtaken.is_set()
    assert len(second.calls[before:]) == 2
    assert lanes.counts.sent_bytes == sum(lane.channel.sent_bytes for lane in lanes.all)


class Clock(Host):
    """A clock that goes on by what a batch takes."""

    time_s = 0.0

    def now_s(self):
        return self.time_s


def test_a_batch_grows_while_the_wire_is_fast(memory):
    clock, encoder = Clock(), Encoder()
    lane = Lane(memory, Outlet(), encoder, PlainCoder(memory, encoder), says_zero=False, on_sent=lambda gfns: None)
    sizes = []
    for batch in Lanes(lane, host=clock).batches(np.arange(13 * 1024 + 5, dtype=np.uint64)):
        clock.time_s += 0.5 if len(sizes) == 3 else 0.001
        sizes.append(batch.size / 1024)
    assert sizes == [1, 2, 4, 4, 1, 1 + 5 / 1024]


def test_what_is_given_back_while_it_is_sent_is_left_out(memory):
    class Racing(PlainCoder):
        def code(self, gfns, *, fresh):
            if 2 in gfns.tolist():
                memory.remove(np.array([2, 3], np.uint64))
            return super().code(gfns, fresh=fresh)

    outlet, encoder = Outlet(), Encoder()
    outlet.send([encoder.header(), encoder.record(StaticDataEnd())])
    sent = []
    lane = Lane(memory, outlet, encoder, Racing(memory, encoder), says_zero=False, on_sent=sent.append)
    before = outlet.sent_bytes
    lane.send(np.arange(5, dtype=np.uint64), fresh=False)
    assert (outlet.sent_bytes - before) // 4096 == lane.counts.sent_pages == 3
    assert [gfns.tolist() for gfns in sent] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("begins_zero", "payload_pages"), [(True, 1), (False, 3)])
def test_fresh_zeros_are_sent_where_memory_may_begin_as_anything(memory, begins_zero, payload_pages):
    memory.write(1 << 12, b"content")
    outlet, encoder = Outlet(), Encoder()
    outlet.send([encoder.header(), encoder.record(StaticDataEnd())])
    coder = PlainCoder(memory, encoder)
    lane = Lane(memory, outlet, encoder, coder, says_zero=False, begins_zero=begins_zero, on_sent=lambda gfns: None)
    before = outlet.sent_bytes
    lane.send(np.arange(3, dtype=np.uint64), fresh=True)
    assert (outlet.sent_bytes - before) // 4096 == payload_pages
