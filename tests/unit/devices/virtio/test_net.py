"""The network device over a link that a test plays, and its port: who takes frames when."""

import socket
import threading

import pytest
from virtio_driver import EVENT_IDX, VERSION_1, VirtioDriver, wait_until

from pageferry.backends.link import HEADER_BYTES, MAX_FRAME_BYTES, rarp
from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.errors import UsageError, VmError
from pageferry.core.memory import GuestMemory
from pageferry.devices.bus import DeviceBus
from pageferry.devices.pci import ConfigAddress, ConfigData
from pageferry.devices.virtio.net import VirtioNet
from pageferry.devices.virtio.net_port import NetPort
from pageferry.devices.virtio.queue import SplitQueue
from pageferry.devices.virtio.transport import VirtioPci

MAC = bytes.fromhex("525400123456")
CSUM, GUEST_CSUM, MAC_BIT, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MRG, STATUS = 0, 1, 5, 7, 8, 11, 12, 15, 16
RX, TX = 0, 1
HEADER = bytes(HEADER_BYTES)


class FakeLink:
    """A wire: ``inbound`` waits to be received, ``outbound`` was sent."""

    def __init__(self, offloads=0):
        self.offloads = offloads
        self.left = None
        self.inbound, self.outbound = [], []
        self.claimed = False
        self.failure = None

    def claim(self):
        self.claimed = True

    def release(self):
        self.claimed = False

    close = release

    def fileno(self):
        return -1

    def leave(self, offloads):
        self.left = offloads

    def receive(self, buffer):
        if self.failure:
            raise self.failure
        if not self.inbound:
            return 0
        frame = self.inbound.pop(0)
        buffer[: len(frame)] = frame
        return len(frame)

    def send(self, frame):
        if self.failure:
            raise self.failure
        self.outbound.append(b"".join(frame))


class Net:
    """A network device in slot 1, and its driver."""

    def __init__(self, features=VERSION_1 | 1 << MRG, *, offloads=0, sizes=None):
        self.memory = GuestMemory.linear(16 << 20)
        self.bus = DeviceBus()
        self.link = FakeLink(offloads)
        self.wakes = 0
        self.model = VirtioNet("net0", self.memory, self.link, mac=MAC, wake=self.wake)
        queues = tuple(SplitQueue(self.memory, size) for size in self.model.queue_sizes)
        self.function = VirtioPci(self.model, queues, bar_gpa=0xE000_0000, irq=10, line=self.bus.lines.line(10))
        address = ConfigAddress()
        self.bus.add(address, self.function)
        self.bus.add_regions(ConfigData(address, [self.function]))
        self.driver = VirtioDriver(self.bus, self.memory, 1)
        assert self.driver.begin(features, sizes=sizes)
        self.rx, self.tx = self.driver.rings

    def wake(self):
        self.wakes += 1

    def send(self):
        """Have the driver notify of its frames, and do what the port then does."""
        self.tx.notify()
        self.function.work(TX, self.model.transmit)

    def post(self, *sizes):
        """Make buffers of these sizes available; return where they are."""
        places = [self.driver.area.take(size) for size in sizes]
        for place, size in zip(places, sizes, strict=True):
            self.rx.add(writable=[(place, size)])
        return places

    def come(self, *frames):
        """Have frames come by the link, and the device look."""
        self.link.inbound += [HEADER + frame for frame in frames]
        self.function.serve(RX)


@pytest.mark.parametrize(
    ("offloads", "bits"),
    [
        (0, (MAC_BIT, MRG, STATUS)),
        (7, (MAC_BIT, MRG, STATUS, CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6)),
    ],
)
def test_it_tells_its_address_and_offers_what_its_link_can_do(offloads, bits):
    net = Net(VERSION_1, offloads=offloads)
    assert bytes(net.driver.config(at, 1) for at in range(6)) == MAC
    assert net.driver.config(6, 2) == 1
    assert net.driver.offered() & 0xFFF_FFFF == sum(1 << bit for bit in bits)


@pytest.mark.parametrize(
    ("features", "left"),
    [((), 0), ((GUEST_CSUM,), 1), ((GUEST_CSUM, GUEST_TSO4), 3), ((GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, MRG), 7)],
)
def test_a_link_leaves_to_the_guest_what_its_driver_takes(features, left):
    net = Net(VERSION_1 | sum(1 << bit for bit in features), offloads=7)
    assert net.link.left == left


@pytest.mark.parametrize("layout", [[12, 60], [5, 7, 60], [72], [1] * 72])
def test_frames_go_out_whatever_their_descriptors(layout):
    net = Net()
    frame = bytes(range(72))
    place = net.driver.area.take(72)
    net.memory.write(place, frame)
    starts = [sum(layout[:n]) for n in range(len(layout))]
    net.tx.add([(place + start, size) for start, size in zip(starts, layout, strict=True)])
    wakes = net.wakes
    net.tx.notify()
    assert net.wakes == wakes + 1
    assert not net.link.outbound  # not on the vCPU's thread
    net.send()
    assert net.link.outbound == [frame]
    assert net.tx.collect() == [(0, 0)]


@pytest.mark.parametrize("size", [1, HEADER_BYTES, MAX_FRAME_BYTES + 1])
def test_what_is_not_a_frame_is_dropped(size):
    net = Net()
    net.tx.add([(0x20_0000, size)])
    net.send()
    assert not net.link.outbound
    assert net.tx.collect() == [(0, 0)]
    assert not net.driver.broken


def test_frames_come_in_with_a_header_that_counts_buffers():
    net = Net()
    one, two, three = net.post(2000, 1500, 1500)
    net.come(b"a" * 100, b"b" * 2900)
    assert net.rx.collect() == [(0, 112), (1, 1500), (2, 1412)]
    assert net.memory.read(one, 112) == bytes(10) + b"\1\0" + b"a" * 100
    assert net.memory.read(two, 1500) == bytes(10) + b"\2\0" + b"b" * 1488
    assert net.memory.read(three, 1412) == b"b" * 1412
    assert net.driver.isr() == 1


def test_a_frame_waits_for_room_and_is_not_lost():
    net = Net(VERSION_1 | 1 << MRG | EVENT_IDX)
    net.post(100)
    net.come(b"x" * 1000, b"later")
    assert not net.rx.collect()
    assert not net.model.has_room
    wakes = net.wakes
    assert net.rx.avail_event == 1  # it is told of the next buffer
    places = net.post(500, 500)
    net.rx.notify()
    assert [length for _, length in net.rx.collect()] == [100, 500, 412]
    assert not net.model.has_room
    net.post(100)
    net.rx.notify()
    assert [length for _, length in net.rx.collect()] == [17]
    assert net.model.has_room
    assert net.wakes == wakes + 1
    assert net.memory.read(places[0], 500) == b"x" * 500


def test_without_merging_a_frame_has_one_buffer_or_is_dropped():
    net = Net(VERSION_1)
    (place,) = net.post(200)
    net.come(b"x" * 500, b"fits")
    assert net.rx.collect() == [(0, 16)]
    assert net.memory.read(place, 16) == bytes(10) + b"\1\0" + b"fits"


def test_a_frame_that_the_whole_queue_cannot_hold_is_dropped():
    net = Net(sizes={0: 4})
    net.post(10, 10, 10, 10)
    net.come(b"x" * 100)
    assert not net.rx.collect()
    assert not net.driver.broken
    assert net.model.has_room


def test_many_frames_come_in_batches():
    net = Net()
    net.post(*[100] * 100)
    net.come(*[b"frame"] * 100)
    assert len(net.rx.collect()) == 64
    net.function.serve(RX)
    assert len(net.rx.collect()) == 36


def test_a_broken_link_is_dead_until_it_is_claimed_again():
    net = Net()
    net.post(100)
    net.link.failure = ConnectionResetError(104, "gone")
    net.come(b"lost")
    net.tx.add([(0x20_0000, 100)])
    net.send()
    assert not net.driver.broken
    assert not net.model.has_room
    net.link.failure = None
    net.function.serve(RX)
    assert not net.rx.collect()
    net.model.reconnected()
    net.function.serve(RX)
    assert len(net.rx.collect()) == 1


def test_the_frame_that_waits_moves():
    here, there = Net(), Net(VERSION_1)
    here.post(50)
    here.come(b"x" * 100)
    there.memory.write(0, here.memory.read(0, 16 << 20))
    there.bus.load(here.bus.save())
    for net in (here, there):
        net.driver.rings = here.driver.rings
    here.rx.memory = there.memory
    place = here.driver.area.take(100)
    here.rx.add(writable=[(place, 100)])
    there.function.serve(RX)
    assert [length for _, length in here.rx.collect()] == [50, 62]
    assert there.memory.read(place, 62) == b"x" * 62


def test_a_state_that_cannot_be_is_refused():
    net = Net()
    sound = net.model.save()
    for wrong in (
        sound[:-1],
        sound + b"x",
        b"\0" * 6 + sound[6:],
        sound[:6] + (5).to_bytes(4, "little") + bytes(5),
        sound[:6] + (MAX_FRAME_BYTES + 1).to_bytes(4, "little") + bytes(MAX_FRAME_BYTES + 1),
    ):
        with pytest.raises(VmError, match="net0"):
            net.model.load(wrong)
    net.model.load(sound)


def test_a_wrong_address_is_refused(machine):
    for mac in ("", "52:54:00", "53:54:00:12:34:56", "52-54-00-12-34-56"):
        with pytest.raises(UsageError, match="address"):
            machine(DeviceSpec(kind=DeviceKind.NET, backend="unix:/nowhere", mac=mac))


# -- the port ---------------------------------------------------------------------------------------------------------


class Port:
    """A port with its pump, on a link that a descriptor stands for."""

    def __init__(self, net, sockets):
        self.net, self.held = net, False
        net.link.fileno = sockets[0].fileno
        self.wire = sockets[1]
        self.port = NetPort(net.link, MAC, net.bus, lambda: self.held)
        self.port.connect(net.model, net.function)
        net.model._wake = self.port.wake
        self.arrived = threading.Event()
        receive = net.link.receive

        def noted(buffer):
            size = receive(buffer)
            self.arrived.set()
            return size

        net.link.receive = noted

    def turn(self):
        """Return when the pump has looked once more."""
        self.arrived.clear()
        self.port.wake()
        return self.arrived.wait(0.2 if self.held else 10)


@pytest.fixture
def port():
    sockets = socket.socketpair()
    made = Port(Net(), sockets)
    yield made
    made.port.close()
    made.port.close()
    for each in sockets:
        each.close()


def test_a_port_tells_the_network_at_once_and_hands_over_what_comes(port):
    net = port.net
    net.post(*[100] * 8)
    port.port.claim()
    port.port.claim()
    assert port.turn()
    with net.bus.locked():
        assert net.link.outbound[0] == rarp(MAC)
        net.link.inbound.append(HEADER + b"frame")
    port.arrived.clear()
    port.wire.send(b"!")  # the descriptor is readable
    assert port.arrived.wait(10)
    with net.bus.locked():
        assert [length for _, length in net.rx.collect()] == [17]


def test_a_port_sends_what_the_guest_has_and_only_while_it_may_run(port):
    net = port.net
    net.memory.write(0x20_0000, bytes(range(72)))
    port.port.claim()
    assert port.turn()

    def sent():
        with net.bus.locked():
            return [frame for frame in net.link.outbound if frame != rarp(MAC)]

    with net.bus.locked():
        port.held = True
    net.tx.add([(0x20_0000, 72)])
    net.tx.notify()
    assert not port.turn()
    assert sent() == []
    with net.bus.locked():
        port.held = False
    assert port.turn()
    assert sent() == [bytes(range(72))]
    with net.bus.locked():
        assert net.tx.collect() == [(0, 0)]
    net.tx.add([(0x20_0000, 20)])
    net.tx.notify()  # wakes the pump by itself
    wait_until(lambda: len(sent()) > 1)  # the pump may have looked once more just before
    assert sent() == [bytes(range(72)), bytes(range(20))]


def test_nothing_is_handed_over_while_the_guest_is_held_and_nothing_lost(port):
    net = port.net
    net.post(*[100] * 8)
    port.port.claim()
    assert port.turn()
    with net.bus.locked():
        port.held = True
        net.link.inbound.append(HEADER + b"frame")
    port.wire.send(b"!")
    assert not port.turn()
    with net.bus.locked():
        assert not net.rx.collect()
        port.held = False
    assert port.turn()
    with net.bus.locked():
        assert len(net.rx.collect()) == 1


def test_a_port_that_was_given_back_hands_over_nothing(port):
    port.port.claim()
    assert port.turn()
    port.port.release()
    port.port.release()
    assert not port.net.link.claimed
    port.port.wake()
    port.port.claim()
    assert port.turn()


def test_a_rarp_frame_tells_who_is_here():
    frame = rarp(MAC)
    assert frame[:HEADER_BYTES] == bytes(HEADER_BYTES)
    ethernet = frame[HEADER_BYTES:]
    assert (ethernet[:6], ethernet[6:12], ethernet[12:14], len(ethernet)) == (b"\xff" * 6, MAC, b"\x80\x35", 60)
    assert ethernet[14:42] == bytes.fromhex("0001080006040003") + MAC + bytes(4) + MAC + bytes(4)
