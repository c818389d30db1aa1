"""A simulated network: connections that carry bytes in order, as late as the network likes, until they are cut.

A *way* is one direction of a connection: what is under way there, and what has arrived and was not read. What is sent
takes its time by the network's bandwidth and latency, and waits while the way, or the whole network, stands still.
Behind it may come the end (the sender has closed) or a reset. A reset that overtakes takes what is under way with it.

A socket here is what the engine's :class:`~pageferry.engine.wire.channel.Channel` uses of a ``socket.socket``.
"""

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pageferry.engine.wire.channel import Channel
from simulation.simulated_host import Process, SimulatedHost, Simulation

_NEVER_S = 1e15
_PORT = 4321


class End:
    """The sender has closed."""


class Reset:
    """The connection is no more."""


@dataclass(frozen=True)
class Pace:
    """How a network carries."""

    latency_s: float
    bytes_per_s: float
    window_bytes: int


class Way:
    """One direction of a connection."""

    def __init__(self, network: "Network") -> None:
        self._network = network
        self._under_way: deque[tuple[float, bytes | End | Reset]] = deque()
        self._free_at_s = 0.0
        self.arrived = bytearray()
        self.ended = self.is_reset = self.is_cut = False
        self.stands_until_s = 0.0
        self.sent_bytes = self._under_way_bytes = 0
        self.readers: list = []
        self.writers: list = []

    @property
    def room_bytes(self) -> int:
        """How much may be sent now."""
        return self._network.pace.window_bytes - self._under_way_bytes - len(self.arrived)

    @property
    def unread(self) -> bool:
        """Whether there is something that was not read."""
        return bool(self.arrived) or self._under_way_bytes > 0

    def put(self, what: bytes | End | Reset) -> None:
        """Put something under way; where the connection is cut it goes nowhere."""
        if self.is_cut:
            return
        pace, simulation = self._network.pace, self._network.simulation
        size_bytes = len(what) if isinstance(what, bytes) else 0
        self._free_at_s = max(self._free_at_s, simulation.now_s) + size_bytes / pace.bytes_per_s
        self._under_way.append((self._free_at_s + pace.latency_s, what))
        self._under_way_bytes += size_bytes
        self.sent_bytes += size_bytes
        self._network.moved_bytes += size_bytes
        simulation.wake(self.readers)

    def lose(self) -> None:
        """Lose what is under way."""
        self._under_way.clear()
        self._under_way_bytes = 0

    def deliver(self) -> None:
        """Let arrive what has come by now."""
        now_s = self._network.simulation.now_s
        while self._under_way and self.next_at_s() <= now_s:
            _, what = self._under_way.popleft()
            if isinstance(what, bytes):
                self._under_way_bytes -= len(what)
                self.arrived += what
            elif isinstance(what, End):
                self.ended = True
            else:
                self.is_reset = True
                self._network.simulation.wake(self.writers)

    def next_at_s(self) -> float:
        """Return when the next thing arrives."""
        if not self._under_way:
            return _NEVER_S
        return max(self._under_way[0][0], self.stands_until_s, self._network.stands_until_s)


class Connection:
    """Two ways and their sockets; number 0 has connected, number 1 was accepted."""

    def __init__(self, network: "Network", index: int, processes: tuple[Process, Process]) -> None:
        self.network = network
        self.index = index
        self.ways = (Way(network), Way(network))  # way i is read at end i
        hosts = tuple(network.host_of(process) for process in processes)
        self.ends = (SimulatedSocket(self, 0, hosts[0]), SimulatedSocket(self, 1, hosts[1]))

    def cut(self, side: int | None, *, loses: bool) -> None:
        """Reset the connection for one end, or for both; an end that is not told hears nothing more.

        Args:
            side: which end is told; None: both.
            loses: whether what is under way is lost.
        """
        for index, way in enumerate(self.ways):
            if loses:
                way.lose()
            if side in (None, index):
                way.put(Reset())
            way.is_cut = True
            self.network.simulation.wake(way.readers)

    def stand_still(self, side: int, duration_s: float) -> None:
        """Let nothing arrive at one end for a while."""
        way = self.ways[side]
        way.stands_until_s = max(way.stands_until_s, self.network.simulation.now_s + duration_s)


class SimulatedSocket:
    """One end of a connection."""

    family = socket.AF_INET

    def __init__(self, connection: Connection, side: int, host: SimulatedHost) -> None:
        self.connection = connection
        self.host = host
        self._simulation = host.simulation
        self._side = side
        self._in, self._out = connection.ways[side], connection.ways[1 - side]
        self.closed = self._shut_in = self._shut_out = False

    @property
    def _peer(self) -> "SimulatedSocket":
        return self.connection.ends[1 - self._side]

    # -- as a socket -----------------------------------------------------------------------------------------------

    def setblocking(self, blocking):
        """Let no call wait."""
        assert not blocking

    def setsockopt(self, *_):
        """Take any option."""

    def getsockopt(self, *_):
        """Say that all was acknowledged."""
        return bytes(60)

    def getpeername(self):
        """Return where the peer is."""
        return self._peer.host.process.name, _PORT

    def sendmsg(self, buffers, ancillary=()):
        """Send some."""
        assert not ancillary
        room_bytes = self._room_bytes()
        if room_bytes is None:
            return sum(map(len, buffers))
        sent = 0
        for buffer in buffers:
            part = bytes(buffer[: room_bytes - sent])
            if not part:
                break
            self._out.put(part)
            sent += len(part)
        self.connection.network.sent(self.connection, self._side, self._out.sent_bytes)
        return sent

    def _room_bytes(self) -> int | None:
        """Return how much can be sent now, at least a byte; None: all of it, and it will be lost."""
        self._simulation.step()
        self._expect_open()
        self._in.deliver()
        if self._in.is_reset:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if self._shut_out:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if self._peer.closed:  # what arrives there is answered by a reset
            self._in.put(Reset())
            return None
        if self._out.room_bytes <= 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return self.connection.network.allows(self.connection, self._side, self._out.room_bytes)

    def recv(self, count, flags=0):
        """Receive some."""
        self._simulation.step()
        self._expect_input()
        data = bytes(self._in.arrived[:count])
        if not flags & socket.MSG_PEEK:
            self._took(len(data))
        return data

    def recv_into(self, buffer):
        """Receive some into a buffer."""
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def recvmsg_into(self, views):
        """Receive some into several buffers."""
        self._simulation.step()
        self._expect_input()
        at = 0
        for view in views:
            part = self._in.arrived[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        self._took(at)
        return at, [], 0, None

    def shutdown(self, how):
        """Say that nothing more will be sent, or received either."""
        self._simulation.step()
        self._expect_open()
        if self._in.is_reset:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if not self._shut_out:
            self._shut_out = True
            self._out.put(End())
        if how == socket.SHUT_RDWR:
            self._shut_in = True
        self._simulation.wake(self._in.readers)
        self._simulation.wake(self._out.writers)

    def close(self):
        """Close it: with what was not read, the connection is reset."""
        self._simulation.expect_alive()
        self.hang_up()

    # -- as the kernel ---------------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Close it, on any thread."""
        if self.closed:
            return
        self.closed = True
        if self._in.unread and not self._shut_in:
            if self._simulation.draw.random() < 0.5:
                self._out.lose()
            self._out.put(Reset())
        elif not self._shut_out:
            self._out.put(End())
        self._simulation.wake(self._in.writers)  # not our own: a thread that waits notices nothing of a close

    def wait_readable(self, wait_s: float) -> bool:
        """Tell whether :meth:`recv` would return at once, within so many seconds."""
        self._simulation.step()
        until_s = self._simulation.now_s + wait_s
        while not self._has_input():
            if self._simulation.now_s >= until_s:
                return False
            left_s = min(until_s, max(self._in.next_at_s(), self._simulation.now_s + 1e-6)) - self._simulation.now_s
            self._simulation.wait(self._in.readers, left_s)
        return True

    def wait_writable(self, wait_s: float) -> None:
        """Wait until there is room, or something says that there will be none."""
        self._simulation.step()
        until_s = self._simulation.now_s + wait_s
        while not (self._peer.closed or self._out.room_bytes > 0 or self._shut_out or self.closed):
            self._in.deliver()
            now_s = self._simulation.now_s
            if self._in.is_reset or now_s >= until_s:
                return
            self._simulation.wait(self._out.writers, min(until_s, max(self._in.next_at_s(), now_s + 1e-6)) - now_s)

    def _expect_input(self) -> None:
        self._expect_open()
        if not self._has_input():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if self._in.is_reset and not self._in.arrived and not self._shut_in:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def _has_input(self) -> bool:
        self._in.deliver()
        return bool(self._in.arrived) or self._in.ended or self._in.is_reset or self._shut_in or self.closed

    def _took(self, size_bytes: int) -> None:
        del self._in.arrived[:size_bytes]
        if size_bytes:
            self._simulation.wake(self._in.writers)

    def _expect_open(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class SimulatedListener:
    """Where a process listens."""

    def __init__(self, host: SimulatedHost) -> None:
        self.host = host
        self._simulation = host.simulation
        self.calls: list[SimulatedSocket] = []
        self.waiters: list = []
        self.closed = False

    def accept(self):
        """Return the next connection."""
        self._simulation.step()
        while not self.calls:
            if self.closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._simulation.wait(self.waiters)
        return self.calls.pop(0)

    def shutdown(self):
        """Wake who waits."""
        self.closed = True
        self._simulation.wake(self.waiters)

    def close(self):
        """Listen no more."""
        self.shutdown()
        for call in self.calls:
            call.hang_up()
        self.calls = []


@dataclass
class Network:
    """The network, and the faults in it.

    ``sent``: told of bytes that were sent: connection, end, how many so far there. ``stands_until_s``: until when
    nothing arrives anywhere.
    """

    simulation: Simulation
    pace: Pace
    sent: Callable[[Connection, int, int], None] = lambda *_: None
    #: Returns how many of so many bytes may be sent before somebody wants to be told.
    allows: Callable[[Connection, int, int], int] = lambda *arguments: arguments[-1]
    stands_until_s: float = 0.0
    moved_bytes: int = 0
    connections: list[Connection] = field(default_factory=list)
    listeners: dict[str, SimulatedListener] = field(default_factory=dict)
    hosts: dict[str, SimulatedHost] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    """The processes whose hosts have lost their power."""

    def host_of(self, process: Process) -> SimulatedHost:
        """Return a process's host."""
        return self.hosts.setdefault(process.name, SimulatedHost(self.simulation, process))

    def sockets_of(self, process: Process) -> list[SimulatedSocket]:
        """Return a process's ends of all connections."""
        return [end for connection in self.connections for end in connection.ends if end.host.process is process]

    def lose_process(self, process: Process, *, power: bool) -> None:
        """Close what a process had open, as the kernel does; nothing at all happens when its host lost its power."""
        for name, listener in self.listeners.items():
            if listener.host.process is process:
                listener.close()
                if power:
                    self.silent.add(name)
        for end in self.sockets_of(process):
            if power:
                way = end.connection.ways[1 - end._side]
                way.lose()
                way.stands_until_s = _NEVER_S
            else:
                end.hang_up()


@dataclass(frozen=True)
class SimulatedEndpoint:
    """An address, as one process sees it."""

    network: Network
    process: Process
    name: str
    host: str = "simulated"
    path: str = ""

    def __str__(self) -> str:
        return f"tcp://{self.name}"

    def expect_suits(self, credentials):
        """Nothing here is encrypted."""
        assert credentials is None

    def connect(self, timeout_s, given_up=lambda: False):
        """Connect."""
        host, network = self.network.host_of(self.process), self.network
        until_s = host.now_s() + timeout_s
        while network.stands_until_s > host.now_s() or self.name in network.silent:
            if given_up() or host.now_s() >= until_s:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            host.sleep(0.1)
        host.sleep(2 * network.pace.latency_s)
        listener = network.listeners.get(self.name)
        if listener is None or listener.closed:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        processes = (self.process, listener.host.process)
        connection = Connection(network, len(network.connections), processes)
        network.connections.append(connection)
        listener.calls.append(connection.ends[1])
        network.simulation.wake(listener.waiters)
        return Channel(connection.ends[0], timeout_s, host)

    def listen(self):
        """Listen."""
        listener = self.network.listeners[self.name] = SimulatedListener(self.network.host_of(self.process))
        self.network.silent.discard(self.name)
        return listener

    def bound(self, _):
        """Return the address."""
        return self
