"""The bandwidth cap from above and from below, on a clock that only the senders move."""

import heapq

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.engine.options import MIN_BANDWIDTH_BYTES_PER_S
from pageferry.engine.pages.encode import PlainCoder
from pageferry.engine.pages.send import Lane, Lanes
from pageferry.engine.wire.pacer import BURST_S, Pacer
from pageferry.stream.encoder import Encoder
from pageferry.stream.order import Role
from pageferry.stream.records import StaticDataEnd

MiB = 1 << 20
SPAN_S = 10.0
EPSILON_S = 1e-6
rates = st.integers(MIN_BANDWIDTH_BYTES_PER_S, 10 << 30)


class Outlet:
    """Takes bytes as fast as the pacer lets it, on a clock of its own."""

    def __init__(self, rate):
        self.now_s = 0.0
        self.sent_bytes = 0
        self.log = []
        self.pacer = Pacer(rate, lambda: self.now_s)

    def send(self, buffers):
        size = sum(map(len, buffers))
        self.now_s += self.pacer.reserve(size)
        self.log.append((self.now_s, size))
        self.sent_bytes += size

    def abort(self):
        raise AssertionError("the test does not give up")

    close = abort


@settings(max_examples=40)
@given(rates, st.integers(1, 1500), st.booleans())
def test_what_a_lane_sends_takes_the_time_that_the_cap_says(rate, pages, content):
    """From below too: but for the last record the engine's own batches use all of the rate, and none is too large."""
    memory = GuestMemory.linear(8 * MiB)
    if content:
        memory.views(np.array([0], np.uint64), np.array([pages], np.uint64))[0][:: PAGE_SIZE // 2] = bytes(
            [1] * (2 * pages)
        )
    outlet, encoder = Outlet(rate), Encoder(Role.SECTION)
    outlet.send([encoder.header(), encoder.record(StaticDataEnd())])
    lane = Lane(memory, outlet, encoder, PlainCoder(memory, encoder), says_zero=True, on_sent=lambda _: None)
    Lanes(lane).send(np.arange(pages, dtype=np.uint64), fresh=True)
    last_s, last_bytes = outlet.log[-1]
    assert abs((outlet.sent_bytes - last_bytes) - rate * last_s) <= rate * EPSILON_S + 1
    assert max(size for _, size in outlet.log) <= 1.01 * max(rate * BURST_S, PAGE_SIZE)
    assert (outlet.sent_bytes > pages * PAGE_SIZE) == content


def shared(rate, lateness):
    """When how much leaves over ten seconds: one sender for each list of how late it is, in turn, in pieces' times."""
    now_s = [0.0]
    pacer = Pacer(rate, lambda: now_s[0])
    size = pacer.batch_pages * PAGE_SIZE
    asking = [(0.0, sender) for sender in range(len(lateness))]
    log, turns = [], [0] * len(lateness)
    while asking[0][0] < SPAN_S:
        now_s[0], sender = heapq.heappop(asking)
        late = lateness[sender]
        leaves_s = now_s[0] + pacer.reserve(size) + late[turns[sender] % len(late)] * size / rate
        turns[sender] += 1
        log.append((leaves_s, size))
        heapq.heappush(asking, (leaves_s, sender))
    return sorted(log)


@settings(max_examples=60)
@given(
    st.integers(MIN_BANDWIDTH_BYTES_PER_S, 256 * MiB),
    st.lists(st.lists(st.floats(0, 0.9), min_size=1, max_size=5), min_size=1, max_size=16),
)
def test_senders_that_share_a_cap_use_it_and_no_more(rate, lateness):
    """Within 5 % over ten seconds, above and below, for 1 to 16 connections, late by less than a piece takes."""
    passed = sum(size for at_s, size in shared(rate, lateness) if at_s <= SPAN_S)
    piece = Pacer(rate).batch_pages * PAGE_SIZE
    assert passed <= 1.05 * rate * SPAN_S + piece
    assert passed >= 0.95 * rate * SPAN_S - len(lateness) * piece
