"""Lanes: all connections of a migration, at the source; every page has its own.

The lane of a page is a matter of its gfn alone, so what is said of a page arrives in the order in which it was said
however far one connection runs ahead of another. A round ends when all lanes have sent their part.
"""

import queue
import threading
from collections.abc import Callable, Sequence

from pageferry.core.frames import GfnArray
from pageferry.engine.pages.lane import Lane, Sent
from pageferry.engine.pages.stripes import connection_of
from pageferry.engine.verify.audit import Proof

#: How much waits for a connection: enough that it never idles, little enough that CLEAN and copy stay close.
_WAITING_TASKS = 2


class Lanes:
    """Sends batches of pages over one or more connections.

    Args:
        main: the first; what goes there is sent on the thread that calls.
        others: each is given a thread, which :meth:`close` ends.
    """

    def __init__(self, main: Lane, others: Sequence[Lane] = ()) -> None:
        self._main = main
        self._others = [_Worker(lane) for lane in others]
        self._all = (main, *others)
        self._count = len(self._all)
        self._main_sent = Sent()

    @property
    def batch_pages(self) -> int:
        """How many pages to give to :meth:`send` at once."""
        return self._main.batch_pages * self._count

    @property
    def sent_bytes(self) -> int:
        """Bytes sent so far on all connections."""
        return self._main.channel.sent_bytes + sum(worker.lane.channel.sent_bytes for worker in self._others)

    @property
    def sent(self) -> Sent:
        """What was sent so far; complete after :meth:`barrier`."""
        return sum((worker.sent for worker in self._others), self._main_sent)

    def send(self, gfns: GfnArray, *, fresh: bool) -> None:
        """Send a batch, each page on its lane; all but the first lane may still be at it afterwards.

        Args:
            gfns: as for :meth:`Lane.send`.
            fresh: as there.

        Raises:
            OSError: a connection was cut or stalled.
        """
        if self._others:
            lanes = connection_of(gfns, self._count)
            for index, worker in enumerate(self._others, 1):
                if (part := gfns[lanes == index]).size:
                    worker.send(part, fresh=fresh)
            gfns = gfns[lanes == 0]
        self._main_sent += self._main.send(gfns, fresh=fresh)

    def send_proof(self, proof: Proof) -> None:
        """Send digests, each on the lane of its pages: a run lies in one piece of 2 MiB.

        Raises:
            OSError: a connection was cut or stalled.
        """
        lanes = connection_of(proof.first_gfns, self._count)
        for index, worker in enumerate(self._others, 1):
            worker.send_proof(proof.part(lanes == index))
        self._main.send_proof(proof.part(lanes == 0))

    def barrier(self) -> None:
        """Wait until all that was given to :meth:`send` is sent.

        Raises:
            OSError: a connection was cut or stalled.
        """
        for worker in self._others:
            worker.wait()

    def send_removed(self, gfns: GfnArray) -> None:
        """As :meth:`Lane.send_removed`, each page on its lane; after a :meth:`barrier`."""
        lanes = connection_of(gfns, self._count)
        for index, lane in enumerate(self._all):
            lane.send_removed(gfns[lanes == index])

    def send_fence(self, number: int) -> None:
        """As :meth:`Lane.send_fence`, on every lane; after a :meth:`barrier`."""
        for lane in self._all:
            lane.send_fence(number)

    def finish(self) -> None:
        """End the sections, after a :meth:`barrier`; the main stream goes on.

        Raises:
            OSError: a connection was cut or stalled.
        """
        for worker in self._others:
            worker.lane.finish()

    def close(self) -> None:
        """End the threads and their connections, whatever is still waiting there. May be repeated."""
        for worker in self._others:
            worker.close()


class _Worker:
    """A lane with a thread."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.sent = Sent()
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING_TASKS)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lane", daemon=True)
        self._thread.start()

    def send(self, gfns: GfnArray, *, fresh: bool) -> None:
        def task() -> None:
            self.sent += self.lane.send(gfns, fresh=fresh)

        self._put(task)

    def send_proof(self, proof: Proof) -> None:
        self._put(lambda: self.lane.send_proof(proof))

    def wait(self) -> None:
        self._tasks.join()
        self._check()

    def close(self) -> None:
        self.lane.channel.abort()
        if self._thread.is_alive():
            self._tasks.put(None)
            self._thread.join()
        self.lane.channel.close()

    def _put(self, task: Callable[[], None]) -> None:
        self._check()
        self._tasks.put(task)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self._failure is None:  # or else only make room: whoever waits is told
                    task()
            except BaseException as error:
                self._failure = error
            finally:
                self._tasks.task_done()
