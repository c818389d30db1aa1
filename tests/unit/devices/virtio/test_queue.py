"""Split rings: chains, notifications either way, and a law of ours: what the device writes is marked after it."""

import pytest
from virtio_driver import EVENT_IDX, IN_TABLE, INDIRECT, NEXT, VERSION_1, WRITE, Area, Ring

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.devices.virtio.queue import RingError, SplitQueue, gather, part_of, scatter, size_of

SIZE = 8
END = 16 << 20


class Rings:
    """A queue, and its driver without a device in between."""

    def __init__(self, features=0):
        self.memory = GuestMemory.linear(END)
        self.area = Area()
        self.ring = Ring(self, 0, SIZE)
        self.queue = SplitQueue(self.memory, SIZE)
        self.queue.enabled = True
        self.queue.event_idx, self.queue.indirect = bool(features & EVENT_IDX), bool(features & INDIRECT)
        self.queue.descriptors, self.queue.driver, self.queue.device = self.ring.desc, self.ring.avail, self.ring.used


@pytest.fixture(params=[VERSION_1, VERSION_1 | EVENT_IDX | INDIRECT])
def rings(request):
    return Rings(request.param)


@pytest.fixture
def plain():
    return Rings()


def test_a_chain_is_what_the_driver_made(rings):
    assert rings.queue.pop() is None
    head = rings.ring.add([(0x1000, 16), (0x2000, 100)], [(0x3000, 512), (0x4000, 1)])
    chain = rings.queue.pop()
    assert (chain.head, chain.readable, chain.writable) == (
        head,
        ((0x1000, 16), (0x2000, 100)),
        ((0x3000, 512), (0x4000, 1)),
    )
    assert rings.queue.pop() is None
    rings.queue.push((head, 513))
    assert rings.ring.collect() == [(head, 513)]


def test_rings_go_round_and_indices_wrap(rings):
    rings.queue.next_available = rings.queue.next_used = rings.queue.signalled = 0xFFFD
    rings.ring.avail_idx = rings.ring.seen = 0xFFFD
    rings.memory.write(rings.ring.used + 2, b"\xfd\xff")
    rings.memory.write(rings.ring.avail + 2, b"\xfd\xff")
    for n in range(3 * SIZE):
        head = rings.ring.add([(0x1000 * (n + 1), n)])
        chain = rings.queue.pop()
        assert chain.readable == ((0x1000 * (n + 1), n),)
        rings.queue.push((chain.head, n))
        assert rings.ring.collect() == [(head, n)]
    assert rings.queue.next_used == (0xFFFD + 3 * SIZE) & 0xFFFF


def test_a_full_ring_is_full_and_no_more(plain):
    heads = [plain.ring.add([(0x1000, 8)]) for _ in range(SIZE)]
    assert plain.queue.waiting() == SIZE
    assert [chain.head for chain in plain.queue.drain()] == heads
    plain.queue.put_back(2)
    assert [chain.head for chain in plain.queue.drain()] == heads[-2:]


def test_several_chains_are_given_back_at_once(plain):
    heads = [plain.ring.add(writable=[(0x1000, 8)]) for _ in range(3)]
    list(plain.queue.drain())
    seen = []
    plain.memory.on_write(lambda gfns: seen.append(plain.ring.u16(plain.ring.used + 2)))
    plain.queue.push(*((head, 8) for head in heads))
    assert seen == [0, 0, 0, 3]
    assert plain.ring.collect() == [(head, 8) for head in heads]


def test_chains_of_the_whole_queue_and_indirect_ones_as_long_are_allowed():
    rings = Rings(INDIRECT)
    buffers = [(0x1000 * n, n + 1) for n in range(1, SIZE + 1)]
    rings.ring.add(buffers)
    assert rings.queue.pop().readable == tuple(buffers)
    rings.queue.push((0, 0))
    rings.ring.collect()
    rings.ring.add(buffers[:3], buffers[3:], indirect=True)
    chain = rings.queue.pop()
    assert chain.readable + chain.writable == tuple(buffers)


def descriptor(rings, index, gpa=0x1000, length=8, flags=0, following=0):
    rings.ring.put_descriptor(index, gpa, length, flags, following)


def test_a_driver_that_breaks_the_rules_is_told():
    def loop(rings):
        descriptor(rings, 0, flags=NEXT, following=1)
        descriptor(rings, 1, flags=NEXT, following=0)
        rings.ring.offer(0)

    def head_outside(rings):
        rings.ring.offer(SIZE)

    def next_outside(rings):
        descriptor(rings, 0, flags=NEXT, following=0xFFFF)
        rings.ring.offer(0)

    def wild_address(rings):
        descriptor(rings, 0, gpa=2**64 - 4)
        rings.ring.offer(0)

    def past_the_end(rings):
        descriptor(rings, 0, gpa=END - 4)
        rings.ring.offer(0)

    def read_after_write(rings):
        descriptor(rings, 0, flags=NEXT | WRITE, following=1)
        descriptor(rings, 1)
        rings.ring.offer(0)

    def too_many(rings):
        rings.memory.write(rings.ring.avail + 2, (SIZE + 1).to_bytes(2, "little"))

    def table_in_table(rings):
        descriptor(rings, 0, gpa=0x9000, length=16, flags=IN_TABLE)
        rings.memory.write(0x9000, bytes(8) + (16).to_bytes(4, "little") + IN_TABLE.to_bytes(2, "little") + bytes(2))
        rings.ring.offer(0)

    def table_and_next(rings):
        descriptor(rings, 0, gpa=0x9000, length=16, flags=IN_TABLE | NEXT)
        rings.ring.offer(0)

    def odd_table(rings):
        descriptor(rings, 0, gpa=0x9000, length=24, flags=IN_TABLE)
        rings.ring.offer(0)

    def empty_table(rings):
        descriptor(rings, 0, gpa=0x9000, length=0, flags=IN_TABLE)
        rings.ring.offer(0)

    def wild_table(rings):
        descriptor(rings, 0, gpa=END, length=16, flags=IN_TABLE)
        rings.ring.offer(0)

    def endless_table(rings):
        descriptor(rings, 0, gpa=0x9000, length=16 * (SIZE + 1), flags=IN_TABLE)
        one = (0x1000).to_bytes(8, "little") + (1).to_bytes(4, "little") + NEXT.to_bytes(2, "little")
        rings.memory.write(0x9000, b"".join(one + (n + 1).to_bytes(2, "little") for n in range(SIZE + 1)))
        rings.ring.offer(0)

    def wild_rings(rings):
        rings.queue.driver = 2**63

    def wild_descriptors(rings):
        rings.queue.descriptors = END - 8
        rings.ring.offer(1)

    for abuse in [value for value in locals().values() if callable(value)]:
        rings = Rings(INDIRECT)
        abuse(rings)
        with pytest.raises(VmError):
            rings.queue.pop()
        assert rings.queue.next_available == 0, abuse.__name__


def test_an_indirect_table_without_the_feature_is_refused(plain):
    plain.ring.add([(0x1000, 8)], indirect=True)
    with pytest.raises(RingError):
        plain.queue.pop()


def test_interrupts_come_unless_the_driver_has_none_of_them(plain):
    assert not plain.queue.wants_interrupt()
    head = plain.ring.add(writable=[(0x1000, 8)])
    plain.queue.pop()
    plain.queue.push((head, 0))
    assert plain.queue.wants_interrupt()
    assert not plain.queue.wants_interrupt()
    plain.memory.write(plain.ring.avail, b"\1\0")
    plain.queue.push((head, 0))
    assert not plain.queue.wants_interrupt()


@pytest.mark.parametrize("start", [0, 5, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_with_event_idx_an_interrupt_comes_when_the_event_is_passed(start, count):
    for ahead in range(-3, 7):
        rings = Rings(EVENT_IDX)
        rings.queue.next_used = rings.queue.signalled = start
        rings.ring.set_used_event((start + ahead) & 0xFFFF)
        for _ in range(count):
            rings.queue.push((0, 0))
        assert rings.queue.wants_interrupt() == (0 <= ahead < count), ahead


def test_notifications_are_asked_for_and_waived():
    plain, events = Rings(), Rings(EVENT_IDX)
    plain.queue.want_no_notification()
    assert plain.ring.u16(plain.ring.used) == 1
    plain.queue.ask_for_notification()
    assert plain.ring.u16(plain.ring.used) == 0
    events.ring.add([(0x1000, 8)])
    list(events.queue.drain())
    assert events.ring.avail_event == 1
    events.queue.want_no_notification()
    assert (events.ring.u16(events.ring.used), events.ring.avail_event) == (0, 1)


def test_a_chain_that_comes_just_before_the_driver_is_told_is_seen():
    rings = Rings(EVENT_IDX)
    asked = []

    def add_late(gfns):
        if not asked:
            asked.append(True)
            rings.memory.on_write(None)
            rings.ring.add([(0x1000, 8)])

    rings.memory.on_write(add_late)
    assert [chain.head for chain in rings.queue.drain()] == [0]
    assert rings.ring.avail_event == 1


def test_a_ring_that_is_fed_while_it_is_served_ends(rings):
    """What is made available meanwhile the driver notifies of, which the event index asks for."""
    for _ in range(3):
        rings.ring.add([(0x1000, 8)])
    served = []
    for chain in rings.queue.drain():
        rings.ring.offer(chain.head)
        served.append(chain.head)
        assert len(served) < 100
    assert served == [0, 1, 2]
    assert rings.queue.waiting() == 3
    assert rings.ring.avail_event == (3 if rings.queue.event_idx else 0)
    assert [chain.head for chain in rings.queue.drain()] == served


def test_ranges_are_one_row_of_bytes():
    memory = GuestMemory.linear(END)
    ranges = ((0x1000, 3), (0x2000, 0), (0x3000, 5))
    assert size_of(ranges) == 8
    whole = [(gpa + n, 1) for gpa, size in ranges for n in range(size)]
    for start in range(10):
        for size in range(10):
            part = part_of(ranges, start, size)
            assert [(gpa + n, 1) for gpa, length in part for n in range(length)] == whole[start : start + size]
    scatter(memory, ranges, b"abcdefg")
    assert gather(memory, ranges) == b"abcdefg\0"


def test_what_the_device_writes_is_marked_when_it_is_there(plain):
    seen = []
    plain.memory.on_write(lambda gfns: seen.append((gfns.tolist(), plain.memory.read(0x1FFE, 4))))
    scatter(plain.memory, ((0x1FFE, 4),), b"wxyz")
    assert seen == [([1, 2], b"wxyz")]
    with pytest.raises(RuntimeError), plain.memory.writing(((0x5000, 1),)):
        raise RuntimeError
    assert seen[-1][0] == [5]
    with pytest.raises(VmError), plain.memory.writing(((0x5000, 1), (END, 1))):
        pytest.fail("entered")
