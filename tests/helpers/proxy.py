"""A wire that can be cut, held and listened to."""

import contextlib
import socket
import struct
import threading

from pageferry.engine.wire.channel import Endpoint


def marker(frame_type):
    """Where a frame of that type begins on the wire."""
    return struct.pack("<I", frame_type)


class _Proxy:
    """What the proxies here share: a listener, connections in pairs, and a thread for all that waits.

    Attributes:
        endpoint: where it listens.
    """

    def __init__(self, target):
        self._target = target
        self._sockets = []
        self._threads = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint(host="127.0.0.1", port=self._listener.getsockname()[1])
        self._begin(self._accept)

    @property
    def uri(self):
        return f"tcp://127.0.0.1:{self.endpoint.port}"

    def _begin(self, run, *arguments):
        self._threads.append(threading.Thread(target=run, args=arguments))
        self._threads[-1].start()

    def _accept(self):
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            try:
                outer = self._connect()
            except OSError:
                inner.close()
                continue
            self._sockets += [inner, outer]
            self._forward(inner, outer)

    def _connect(self):
        return socket.create_connection((self._target.host, self._target.port))

    def cut(self):
        """Cut all connections that there are."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join()
        for sock in self._sockets:
            sock.close()


class Wire(_Proxy):
    """A TCP proxy: what goes in at ``uri`` comes out at the target, until the test decides otherwise.

    ``cut_after_bytes``: both connections are cut when so many bytes went from source to destination.
    ``hold_at``: the bytes of that marker, and what follows, are not forwarded (in either direction) until ``release``;
    ``held`` is set when that happened. One connection only.
    """

    def __init__(self, target, *, cut_after_bytes=None, hold_at=None):
        self.cut_after_bytes = cut_after_bytes
        self.hold_at = hold_at
        self.held = threading.Event()
        self.forwarded_bytes = 0
        self._released = threading.Event()
        super().__init__(target)

    def _connect(self):
        self._listener.close()  # a source that comes back finds it closed
        return super()._connect()

    def _forward(self, inner, outer):
        self._begin(self._pump, inner, outer, True)
        self._begin(self._pump, outer, inner, False)

    def _pump(self, source, sink, forward):
        tail = b""
        try:
            while data := source.recv(1 << 16):
                if forward and self.cut_after_bytes is not None:
                    data = data[: self.cut_after_bytes - self.forwarded_bytes]
                if self.hold_at is not None:
                    at = (tail + data).find(self.hold_at) - len(tail)
                    if at >= -len(tail):
                        sink.sendall(data[: max(at, 0)])
                        self.held.set()
                        self._released.wait()
                        data = data[max(at, 0) :]
                    tail = (tail + data)[-len(self.hold_at) + 1 :]
                sink.sendall(data)
                if forward:
                    self.forwarded_bytes += len(data)
                    if self.forwarded_bytes == self.cut_after_bytes:
                        self.cut()
                        return
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self.cut()

    def release(self):
        self._released.set()

    @contextlib.contextmanager
    def cut_when_held(self):
        """Cut it as soon as it holds what it was told to hold; what is held is lost."""
        cutter = threading.Thread(target=lambda: (self.held.wait(60), self.cut()))
        cutter.start()
        yield
        cutter.join()

    def close(self):
        self.release()
        super().close()


class Line(_Proxy):
    """A TCP proxy for any number of connections, on which all may stand still, or which may be down for a time.

    When ``after_bytes`` have gone over it both ways together, or ``at``, the bytes of a marker, are about to, it stands
    still by itself, and ``reached`` is set.
    """

    def __init__(self, target, *, after_bytes=None, at=None):
        self._left_bytes = after_bytes
        self._at = at
        self.reached = threading.Event()
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self._down = False
        super().__init__(target)

    def _connect(self):
        if self._down:
            raise ConnectionRefusedError
        return super()._connect()

    def _forward(self, inner, outer):
        self._begin(self._pump, inner, outer)
        self._begin(self._pump, outer, inner)

    def _pump(self, source, sink):
        tail = b""
        try:
            while data := source.recv(1 << 16):
                while (size := self._now(tail, data)) is not None:
                    sink.sendall(data[:size])
                    tail, data = (tail + data[:size])[-3:], data[size:]
                    self._flows.wait()
                sink.sendall(data)
                tail = (tail + data)[-3:]
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for sock in (source, sink):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _now(self, tail, data):
        """Return how much of ``data`` passes before it all stands still; None: all."""
        with self._lock:
            if not self._flows.is_set():
                return 0
            if self._at is not None and (at := (tail + data).find(self._at)) >= 0:
                self._at = None
                return self._stand_still(max(at - len(tail), 0))
            if self._left_bytes is not None:
                self._left_bytes -= len(data)
                if self._left_bytes < 0:
                    size, self._left_bytes = max(len(data) + self._left_bytes, 0), None
                    return self._stand_still(size)
            return None

    def _stand_still(self, size):
        self._flows.clear()
        self.reached.set()
        return size

    def flow(self):
        """Let it all go on; one that is down is up again."""
        self._down = False
        self._flows.set()

    def stall(self):
        """Let it all stand still."""
        with self._lock:
            self._flows.clear()

    def cut(self):
        """Cut all connections, and refuse others until :meth:`flow`."""
        self._down = True
        super().cut()

    def close(self):
        self.cut()
        self._flows.set()
        super().close()


class Recorder(_Proxy):
    """A TCP proxy for any number of connections that keeps what the source said on each, in ``tapes``, in order."""

    def __init__(self, target):
        self.tapes = []
        super().__init__(target)

    def _forward(self, inner, outer):
        self.tapes.append(bytearray())
        self._begin(self._pump, inner, outer, self.tapes[-1])
        self._begin(self._pump, outer, inner, bytearray())

    @staticmethod
    def _pump(source, sink, tape):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                tape.extend(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def played_again(tape, target):
    """Say to ``target`` what is on a tape, without listening; return what it answered in the end."""
    with socket.create_connection((target.host, target.port), timeout=60) as sock:
        answer = bytearray()
        with contextlib.suppress(OSError):
            sock.sendall(bytes(tape))  # a copy: the tape may still be growing, which it cannot while it is lent
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(1 << 16):
                answer += piece
        return bytes(answer)
