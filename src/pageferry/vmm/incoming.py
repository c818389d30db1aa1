"""Incoming: waits for a guest at an address, takes it in, and tells of it."""

import logging
import socket
import threading
import time
from dataclasses import replace

from pageferry.core.errors import GuestAt, MigrationError, PageferryError, UsageError
from pageferry.core.events import Event, PostcopyPaused, PostcopyRecovered, Warned
from pageferry.core.machine import Machine
from pageferry.core.vm import VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S, Channel, Endpoint, accept_within
from pageferry.engine.wire.listener import Listener
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.guest import Guest
from pageferry.vmm.local_backends import LocalBackends, is_local

_log = logging.getLogger(__name__)
_RETRY_S = 0.05
#: How to go on after post-copy was cut.
RECOVER_HINT = "at the source: pageferry migrate --recover"


class Incoming:
    """The wait for one guest: one attempt after another on a thread of its own, until a guest has arrived.

    It has no lock: the attempt and the listener are each replaced as a whole, by that thread and by :meth:`close`.

    Args:
        guest: the place for it.
        backends: what stands behind its devices here.
        announcer: hears how each attempt goes.
    """

    def __init__(self, guest: Guest, backends: LocalBackends, announcer: Announcer) -> None:
        self._guest = guest
        self._backends = backends
        self._announcer = announcer
        self._attempt: Destination[Machine] | None = None
        self._dropped: set[str] = set()
        self._thread: threading.Thread | None = None
        self._endpoint: Endpoint | None = None
        self._listener: Listener | None = None
        self._last = False

    def listen(self, endpoint: Endpoint) -> Endpoint:
        """Begin to wait at ``endpoint``; return the address, with the port that it really has. Call once.

        Raises:
            UsageError: the address is in use or not ours.
        """
        try:
            listener = endpoint.listen()
        except OSError as error:
            hint = "choose another port, or end what listens there"
            raise UsageError(f"cannot listen at {endpoint}: {error.strerror or error}", hint=hint) from error
        self._listener = listener
        self._endpoint = endpoint.bound(listener)
        self._thread = threading.Thread(target=self._main, name="receive", daemon=True)
        self._thread.start()
        return self._endpoint

    @property
    def listening(self) -> Endpoint | None:
        """Where a guest may still come to, or None."""
        return None if self._listener is None else self._endpoint

    @property
    def missing_pages(self) -> int:
        """How many pages of the guest, which may run here, are still at its source."""
        attempt = self._attempt
        return 0 if attempt is None else attempt.missing_pages

    @property
    def waits_for_source(self) -> bool:
        """Whether the guest stands still until its source, which is gone, comes back."""
        attempt = self._attempt
        return attempt is not None and attempt.waits_for_source

    def begin_no_more(self) -> None:
        """Let the attempt under way be the last. A plain store: a signal handler may call it."""
        self._last = True

    def close(self) -> None:
        """End the wait or the attempt: a guest that has not all arrived is lost, unless it has ended by itself."""
        attempt = self._attempt
        if attempt is not None and self._guest.vm is not None and self._guest.vm.end is not None:
            attempt.release()
        self._stop_listening()
        if attempt is not None:
            attempt.abort()
        if self._thread is not None:
            self._thread.join()

    def _main(self) -> None:
        listener = self._listener
        while listener is not None and not self._last:
            try:
                sock = listener.accept()
            except OSError:
                if self._listener is None:
                    return  # stopped listening
                time.sleep(_RETRY_S)  # out of descriptors, or a source that left at once
                continue
            try:
                self._receive(sock)
            except Exception:
                _log.exception("an attempt to receive a guest ended by a defect")
            if self._guest.vm is not None:
                self._stop_listening()
                return

    def _receive(self, sock: socket.socket) -> None:
        trusted = is_local(sock)

        def make_vm(config: VmConfig) -> Machine:
            devices = self._backends.choose(config.devices, trusted=trusted)
            said = self._guest.machines.accel
            vm = self._guest.make_vm(replace(config, devices=devices))
            if vm.accel != said:
                self._announcer.say(f"machine: {vm.accel} ({self._guest.machines.reason})")
            return vm

        attempt = self._attempt = Destination(
            Channel(sock, DEFAULT_TIMEOUT_S),
            make_vm,
            host_cpu=lambda _: self._guest.machines.host_cpu,
            accept=self._accept_more,
            dropped=self._dropped,
            on_event=self._on_event,
            before_run=self._arrived,
        )
        self._announcer.migration("active")
        try:
            self._take_in(attempt)
        finally:
            self._attempt = None

    def _take_in(self, attempt: Destination[Machine]) -> None:
        try:
            attempt.run()
        except PageferryError as error:
            self._announcer.migration("failed")
            if isinstance(error, MigrationError) and error.guest_at is GuestAt.DESTINATION:
                self._announcer.say(f"the guest is lost: {error}")
                return
            self._guest.lose()
            self._announcer.say(f"no guest received: {error}; waiting for another attempt")
            return
        self._announcer.migration("completed")
        if self._guest.running:
            self._announcer.event("RESUME")
        self._announcer.say("a guest has arrived and is ours")
        attempt.see_off()

    def _accept_more(self, wait_s: float) -> Channel | None:
        listener = self._listener
        if listener is None:
            raise ConnectionAbortedError("no longer listening")
        return accept_within(listener, wait_s, DEFAULT_TIMEOUT_S)

    def _arrived(self, vm: Machine, name: str) -> None:
        with self._guest.lock:
            self._guest.adopt(vm, name)

    def _on_event(self, event: Event) -> None:
        self._announcer.postcopy(event)
        if isinstance(event, Warned):
            self._announcer.say(f"warning: {event.text}")
        elif isinstance(event, PostcopyPaused):
            self._announcer.say(f"{event.reason}; the guest stands still until its source comes back ({RECOVER_HINT})")
            self._announcer.event("STOP")
        elif isinstance(event, PostcopyRecovered):
            self._announcer.say("the source is back, and the guest runs on")
            self._announcer.event("RESUME")
        self._announcer.engine_event(event)

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown()
            listener.close()
            if self._endpoint is not None:
                self._endpoint.remove()
