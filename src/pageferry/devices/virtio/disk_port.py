"""DiskPort: the host's side of one disk: what holds its content, and the thread that does the guest's requests.

A disk may be slow; a request of it holds up no vCPU and no other device. It is taken from its queue and given back to
it under the bus's lock, and done in between without, one at a time::

    port's thread                            freeze
    takes the lock: not held                 .
    takes a request, which is in flight      holds the guest, waits for its vCPUs
    transfers; marks what it wrote (law 4)   waits for what is in flight
    takes the lock: gives the request back   .
    held: takes no other, sleeps             returns: memory stands still

What is in flight is in no state that could be saved, so a freeze waits for it: for one request, of bounded size. Those
behind it stay in the queue, and move with it. A driver that resets its device waits for it too, and gets no answer.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable

from pageferry.backends.disk import DiskFile
from pageferry.core.threads import begin
from pageferry.devices.bus import DeviceBus
from pageferry.devices.doorbells import Doorbells
from pageferry.devices.virtio.blk import REQUESTS, BlkRequest, VirtioBlk
from pageferry.devices.virtio.transport import VirtioPci

_log = logging.getLogger(__name__)


class DiskPort:
    """The port; claimed and released as what stands behind a device.

    Args:
        disk: the content.
        bus: the guest's.
        held: tells whether the guest stands still.
    """

    def __init__(self, disk: DiskFile, bus: DeviceBus, held: Callable[[], bool]) -> None:
        self.disk = disk
        self._bus = bus
        self._held = held
        self._model: VirtioBlk | None = None
        self._function: VirtioPci | None = None
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        self._close_event = weakref.finalize(self, os.close, self._event)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0  # who is to be told of a change: for most requests, none
        self._stopping = self._closed = False
        self._in_flight: BlkRequest | None = None
        self._transferring = False
        self._thread: threading.Thread | None = None

    def connect(self, model: VirtioBlk, function: VirtioPci) -> None:
        """Be the port of a device; before anything else."""
        self._model, self._function = model, function

    def use_doorbells(self, doorbells: Doorbells) -> None:
        """Have the driver wake the thread by itself where the machine can; before anything runs."""
        assert self._function is not None
        self._function.use_doorbells(doorbells, self._event)

    def wake(self) -> None:
        """Look for requests; any thread."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._event, 1)

    def abandon(self) -> None:
        """Return when no transfer is under way; the request in flight is not given back. The bus is locked."""
        with self._lock:
            self._wait_for(lambda: not self._transferring, None)
            self._in_flight = None

    def finish(self, patience_s: float) -> bool:
        """Wait until what is in flight now no longer is, so long at the most; tell whether it is not.

        While the guest is held nothing begins.
        """
        with self._lock:
            request = self._in_flight
            return self._wait_for(lambda: self._in_flight is not request or request is None, patience_s)

    def _wait_for(self, condition: Callable[[], bool], patience_s: float | None) -> bool:
        self._waiting += 1
        try:
            return self._changed.wait_for(condition, patience_s)
        finally:
            self._waiting -= 1

    # -- whose it is -------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Take the disk, and begin to do requests.

        Raises:
            VmError: another process has it.
            OutOfThreadsError: it is not taken.
        """
        self.disk.claim()
        try:
            self._start()
        except BaseException:
            self.disk.release()
            raise

    def release(self) -> None:
        """Do what there is to do, unless the guest is held, have all of it on the disk, and give the disk back.

        Raises:
            OSError: it could not be written; the disk is taken still.
        """
        if self._thread is None:
            return
        self._stop()
        try:
            self.disk.release()
        except BaseException:
            self._start()
            raise

    def close(self) -> None:
        """Let go of the disk for good, when what is in flight has ended. May be called twice."""
        self._stop()
        self.disk.close()
        with self._lock:
            self._closed = True
            self._close_event()

    def _start(self) -> None:
        if self._thread is None:
            self._stopping = False
            self.wake()
            self._thread = begin(self._main, f"{self.disk.path.name}-requests")

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping = True
            self.wake()
            thread.join()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        assert self._model is not None
        assert self._function is not None
        try:
            stopping = False
            while not stopping:
                os.eventfd_read(self._event)
                stopping = self._stopping  # looked at first: what was asked for before that is done
                request = self._next(None, self._model, self._function)
                while request is not None:
                    self._model.perform(request)
                    self._set_in_flight(request, transferring=False)
                    request = self._next(request, self._model, self._function)
        except Exception:
            _log.exception("the requests of disk %s ended by a defect", self.disk.path)

    def _next(self, done: BlkRequest | None, model: VirtioBlk, function: VirtioPci) -> BlkRequest | None:
        """Give a request back, unless it was abandoned, and take the next one; None: there is none to be done now."""
        with self._bus.locked():
            if done is not None and self._in_flight is done:
                function.work(REQUESTS, lambda queue: model.give_back(queue, done))
            request = None if self._held() else function.work(REQUESTS, model.take)
            self._set_in_flight(request, transferring=request is not None)
            return request

    def _set_in_flight(self, request: BlkRequest | None, *, transferring: bool) -> None:
        with self._lock:
            self._in_flight, self._transferring = request, transferring
            if self._waiting:
                self._changed.notify_all()
