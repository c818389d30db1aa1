"""Host: the clock, the threads and the waits of one end of a migration.

What a migration waits for it waits for by this object, so that the simulation can run both ends on threads, a clock and
a network of its own. The exceptions wait on this very host:

- a lock under which nothing of the host's is used is a plain ``threading.Lock``: it never keeps a thread from going on;
- real sockets: making a connection (``wire/channel.py``), TLS (``wire/carrier.py``), accepting (``wire/listener.py``).
  The simulation has connections of its own in place of these;
- files, which the simulation has none of: saving (``image/outlet.py``) and reading lazily (``image/lazy.py``);
- the threads that digest memory (``verify/digests.py``): they compute, and wait for nothing but each other.
"""

import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from pageferry.core.threads import started


class Host:
    """This host: the real clock, and threads of this process."""

    def now_s(self) -> float:
        """Return the time on a monotonic clock in seconds."""
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        """Wait for so many seconds."""
        time.sleep(duration_s)

    def lock(self) -> threading.Lock:
        """Make a lock."""
        return threading.Lock()

    def condition(self) -> threading.Condition:
        """Make a condition with a lock of its own, which one thread may take again."""
        return threading.Condition()

    def event(self) -> threading.Event:
        """Make an event."""
        return threading.Event()

    def queue(self, size: int) -> "queue.Queue[Any]":
        """Make a queue that holds so many; a thread that puts more waits."""
        return queue.Queue(size)

    def thread(self, target: Callable[..., object], name: str, args: tuple[Any, ...] = ()) -> threading.Thread:
        """Make a thread, which is not started and keeps no process alive."""
        return threading.Thread(target=target, name=name, args=args, daemon=True)

    def begin(self, function: Callable[..., object], name: str, *arguments: Any) -> threading.Thread:  # noqa: ANN401
        """Begin to run ``function(*arguments)`` on such a thread; return it.

        Raises:
            OutOfThreadsError: it does not run, and never will.
        """
        return started(self.thread(function, name, arguments))

    def readable(self, sock: socket.socket, wait_s: float) -> bool:
        """Tell whether a socket has something to read, or was closed by its peer, within ``wait_s``."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(wait_s * 1e3))

    def writable(self, sock: socket.socket, wait_s: float) -> bool:
        """Tell whether a socket takes something, or is cut, within ``wait_s``."""
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        return bool(poll.poll(wait_s * 1e3))


#: The one that the engine runs on, unless it is told otherwise.
THIS_HOST = Host()
