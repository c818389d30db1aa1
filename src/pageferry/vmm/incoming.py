"""Incoming: waits for a guest at an address, takes it in, and tells of it."""

import gc
import logging
import math
import threading
from dataclasses import replace

from pageferry.core.command_hints import RECOVER
from pageferry.core.errors import GuestAt, MigrationError, PageferryError, VmError
from pageferry.core.events import Event, PostcopyPaused, PostcopyRecovered, Warned
from pageferry.core.machine import Machine
from pageferry.core.threads import begin
from pageferry.core.vm import VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.room import NO_LIMITS, GuestLimits
from pageferry.engine.wire.acceptor import Acceptor
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S, Endpoint
from pageferry.engine.wire.credentials import Credentials
from pageferry.engine.wire.peer import Peer
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.guest import Guest
from pageferry.vmm.local_backends import LocalBackends, is_local

_log = logging.getLogger(__name__)
#: How to go on after post-copy was cut.
RECOVER_HINT = f"at the source: {RECOVER}"


class Incoming:
    """The wait for one guest: one attempt after another on a thread of its own, until a guest has arrived.

    Once it was told that the attempt is the last, no guest becomes ours any more: its source hears so, and keeps it.

    Args:
        guest: the place for it.
        backends: what stands behind its devices here.
        announcer: hears how each attempt goes.
    """

    def __init__(self, guest: Guest, backends: LocalBackends, announcer: Announcer) -> None:
        self._guest = guest
        self._backends = backends
        self._announcer = announcer
        self._limits = NO_LIMITS
        self._lock = threading.Lock()  # between an attempt that begins and close(), which ends it
        self._attempt: Destination[Machine] | None = None
        self._thread: threading.Thread | None = None
        self._acceptor: Acceptor | None = None
        self._last = False
        self._complete = False

    def listen(
        self,
        endpoint: Endpoint,
        credentials: Credentials | None = None,
        limits: GuestLimits = NO_LIMITS,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Endpoint:
        """Begin to wait at ``endpoint``; return the address, with the port that it really has. Call once.

        Args:
            endpoint: where.
            credentials: who we are and whom we accept, where it is TLS.
            limits: how large a guest may be.
            timeout_s: how long a connection may stand still.

        Raises:
            UsageError: the address is in use or not ours, or TLS and credentials do not go together.
        """
        self._limits = limits
        acceptor = self._acceptor = Acceptor(endpoint, timeout_s, credentials=credentials, on_refused=self._refused)
        self._thread = begin(self._main, "receive", acceptor)
        return acceptor.endpoint

    @property
    def listening(self) -> Endpoint | None:
        """Where a guest may still come to, or None."""
        acceptor = self._acceptor
        return None if acceptor is None or acceptor.closed else acceptor.endpoint

    @property
    def missing_pages(self) -> int:
        """How many pages of the guest, which may run here, are still at its source."""
        attempt = self._attempt
        return 0 if attempt is None else attempt.missing_pages

    @property
    def silent_s(self) -> float | None:
        """For how long nothing has come from the source of the guest that is being received; None: there is none."""
        attempt = self._attempt
        return None if attempt is None or self._complete else attempt.silent_s

    @property
    def unheard(self) -> bool:
        """Whether all of the guest is here, and its source has not heard that yet: it may come back and ask."""
        return self._complete and self._attempt is not None

    @property
    def waits_for_source(self) -> bool:
        """Whether the guest stands still until its source, which is gone, comes back."""
        attempt = self._attempt
        return attempt is not None and attempt.waits_for_source

    def begin_no_more(self) -> None:
        """Let the attempt under way be the last, and no guest arrive that is not ours yet.

        A plain store: a signal handler may call it.
        """
        self._last = True

    def close(self) -> None:
        """End the wait or the attempt: a guest that is not ours yet stays at its source.

        One that is ours and has not all arrived is lost, unless it has ended by itself.
        """
        self.begin_no_more()
        with self._lock:  # an attempt that begins later sees that it may not
            attempt = self._attempt
        if attempt is not None and self._guest.vm is not None and self._guest.vm.end is not None:
            attempt.release()
        if self._acceptor is not None:
            self._acceptor.close()
        if attempt is not None:
            attempt.abort()
        if self._thread is not None:
            self._thread.join()

    def _main(self, acceptor: Acceptor) -> None:
        while not self._last:
            try:
                peer = acceptor.wait()
            except ConnectionAbortedError:
                return
            try:
                self._receive(acceptor, peer)
            except Exception:
                _log.exception("an attempt to receive a guest ended by a defect")
            if self._guest.vm is not None:
                acceptor.close()
                return
            gc.collect()  # a machine's parts know each other: without this what failed is kept for a while

    def _receive(self, acceptor: Acceptor, peer: Peer) -> None:
        trusted = is_local(peer.channel.socket)

        def make_vm(config: VmConfig) -> Machine:
            self._limits.check(config)
            devices = self._backends.choose(config.devices, trusted=trusted)
            said = self._guest.machines.accel
            vm = self._guest.make_vm(replace(config, devices=devices))
            if vm.accel != said:
                self._announcer.say(f"machine: {vm.accel} ({self._guest.machines.reason})")
            return vm

        attempt = Destination(
            peer,
            make_vm,
            host_cpu=lambda _: self._guest.machines.host_cpu,
            accept=acceptor.accept,
            never_ran=acceptor.never_ran,
            asked_within_s=math.inf,
            on_event=self._on_event,
            before_run=self._arrived,
            on_complete=self._completed,
        )
        with self._lock:
            last = self._last
            self._attempt = None if last else attempt
        if last:
            acceptor.turn_away(peer)
            return
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
            self._refused(str(error))

    def _refused(self, text: str) -> None:
        next_one = "" if self._last else "; waiting for another attempt"
        self._announcer.say(f"no guest received: {text}{next_one}")

    def _completed(self) -> None:
        self._complete = True
        self._announcer.migration("completed")
        if self._guest.running:
            self._announcer.event("RESUME")
        self._announcer.say("a guest has arrived and is ours")

    def _arrived(self, vm: Machine, name: str) -> None:
        with self._guest.lock:
            if self._last:
                raise VmError("the destination was told to quit")
            self._guest.adopt(vm, name)

    def _on_event(self, event: Event) -> None:
        self._announcer.postcopy(event)
        if isinstance(event, Warned):
            self._announcer.warn(event.text)
        elif isinstance(event, PostcopyPaused):
            self._announcer.say(f"{event.reason}; the guest stands still until its source comes back ({RECOVER_HINT})")
            self._announcer.event("STOP")
        elif isinstance(event, PostcopyRecovered):
            self._announcer.say("the source is back, and the guest runs on")
            self._announcer.event("RESUME")
        self._announcer.engine_event(event)
