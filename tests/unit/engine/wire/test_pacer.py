"""Pacer: a cap that is changed while it is used."""

from pageferry.engine.wire.pacer import BURST_S, Pacer
from pageferry.stream.format import MAX_PAGES_PER_RECORD

MiB = 1 << 20


def test_without_a_cap_no_thread_waits():
    pacer = Pacer(None, lambda: 0.0)
    assert [pacer.reserve(1 << 40) for _ in range(3)] == [0.0] * 3
    assert pacer.batch_pages == MAX_PAGES_PER_RECORD


def test_a_cap_is_set_changed_and_lifted():
    now_s = 5.0
    pacer = Pacer(None, lambda: now_s)
    pacer.set_rate(MiB)
    assert pacer.reserve(MiB) == 0.0
    assert 1.0 - BURST_S <= pacer.reserve(MiB) <= 1.0
    assert pacer.batch_pages == int(MiB * BURST_S) // 4096
    pacer.set_rate(4 * MiB)  # what was owed at the old rate is forgiven
    assert pacer.reserve(MiB) == 0.0
    assert 0.25 - BURST_S <= pacer.reserve(MiB) <= 0.25
    assert pacer.rate_bytes_per_s == 4 * MiB
    pacer.set_rate(None)
    assert pacer.reserve(1 << 40) == 0.0
