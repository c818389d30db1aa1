"""The two processes of a simulated migration: what is around the engine there, in short."""

import math
from collections.abc import Callable

from pageferry.core.errors import GuestAt, MigrationError, PageferryError
from pageferry.core.events import MigrationReport
from pageferry.core.policy import Policy
from pageferry.engine.destination import Destination
from pageferry.engine.options import MigrationOptions
from pageferry.engine.source import Source
from pageferry.engine.wire.acceptor import Acceptor
from pageferry.engine.wire.peer import Peer
from simulation.interleave import Violated
from simulation.simulated_guest import Machine
from simulation.simulated_host import Process
from simulation.simulated_network import SimulatedEndpoint


class SourceProcess(Process):
    """A process that has the guest, and what :mod:`pageferry.vmm.outgoing` does there.

    Args:
        run: that it is a part of.
        machine: with the guest; None: a new one.
        name: of the process.
    """

    def __init__(self, run, machine: Machine | None = None, name: str = "source") -> None:
        super().__init__(name)
        self._run = run
        self.host = run.network.host_of(self)
        self.machine = machine or run.machine(self.host)
        self.source: Source | None = None
        self._thread = None
        self.told: list[str] = []

    @property
    def job(self):
        """The job of the migration, if there was one."""
        return None if self.source is None else self.source.job

    @property
    def under_way(self) -> bool:
        """Whether it goes on."""
        return self._thread is not None and self._thread.is_alive() and not self.dead

    def begin(self, endpoint: SimulatedEndpoint, policy: Policy, options: MigrationOptions) -> None:
        """Begin to migrate."""
        self.source = Source(
            self.machine, endpoint, policy, options, on_event=self._run.troubles.sees(self), host=self.host
        )
        self._start(self.source.run)

    def recover(self, endpoint: SimulatedEndpoint) -> None:
        """Go on after a cut."""
        job = self.job
        if job is None or job.recover(endpoint):
            return
        if not self.under_way and job.guest_at is GuestAt.UNKNOWN:
            job.begun()
            self._start(lambda: self.source.find_out(endpoint))

    def _start(self, run: Callable[[], MigrationReport]) -> None:
        self._thread = self.host.thread(self._main, "migrate", (run,))
        self._thread.start()

    def _main(self, run: Callable[[], MigrationReport]) -> None:
        try:
            report = run()
        except MigrationError as error:
            self.told.append(f"{error.guest_at}: {error.reason}")
            self._run.note(f"{self.name} ended: {error}")
            self._run.expect_no_defect(error)
            self._run.expect_knows(error)
            self._run.expect_reason(error)
            self._run.is_told(self, error.guest_at)
        else:
            self.told.append(f"{report.guest_at}: {report.reason}")
            self._run.note(f"{self.name} ended: it moved")
            self._run.is_told(self, report.guest_at)

    def join(self) -> None:
        """Wait until it is over."""
        if self._thread is not None:
            self._thread.join()


class ReceiverProcess(Process):
    """A process that waits for a guest, and what :mod:`pageferry.vmm.incoming` does there.

    Args:
        run: that it is a part of.
        name: of the process.
        timeout_s: how long a connection may stand still.
    """

    def __init__(self, run, name: str, timeout_s: float) -> None:
        super().__init__(name)
        self._run = run
        self.host = run.network.host_of(self)
        self.machine: Machine | None = None
        self.attempt: Destination | None = None
        self.ended = self.lost = False
        self.acceptor = Acceptor(SimulatedEndpoint(run.network, self, "there"), timeout_s, host=self.host)
        self._thread = self.host.thread(self._main, "receive")
        self._thread.start()

    @property
    def has_guest(self) -> bool:
        """Whether the guest is here, as far as this process knows."""
        return not self.dead and self.machine is not None and not self.lost

    @property
    def has_all(self) -> bool:
        """Whether the guest is here with all of its pages."""
        return self.machine is not None and (self.attempt is None or not self.attempt.missing_pages)

    def _main(self) -> None:
        while not self.ended:
            try:
                peer = self.acceptor.wait()
            except ConnectionAbortedError:
                return
            self._receive(peer)
            if self.machine is not None:
                self.acceptor.close()
                return

    def _receive(self, peer: Peer) -> None:
        self.attempt = Destination(
            peer,
            self._make,
            accept=self.acceptor.accept,
            never_ran=self.acceptor.never_ran,
            asked_within_s=math.inf,
            on_event=self._run.troubles.sees(self),
            before_run=self._arrived,
        )
        try:
            self.attempt.run()
        except PageferryError as error:
            self._run.note(f"{self.name} ended: {error}")
            self._run.expect_no_defect(error)
            if isinstance(error, MigrationError) and error.guest_at is GuestAt.DESTINATION:
                if self.machine is None:
                    raise Violated("a guest is said to be lost that was never here") from error
                self._run.gave_up(self.machine)
                self.ended = self.lost = True
                self.acceptor.close()
                return
            if self.machine is not None and self.machine is self._run.holder:
                raise Violated(f"{self.name} has the guest, and says that it has not: {error}") from error
            self.machine = None
        else:
            self._run.note(f"{self.name} ended: the guest is here")
            if self.machine is None:
                raise Violated("a guest is said to be here that is not")
        finally:
            self.attempt = None
        self._run.expect_no_threads(self, "section", "populate")

    def _make(self, config) -> Machine:
        self._run.refusals.meet("make_vm")
        return self._run.machine(self.host)

    def _arrived(self, machine: Machine, _: str) -> None:
        self._run.note(f"the guest is {self.name}'s")
        self.machine = machine
        self._run.moved(machine)

    def close(self) -> None:
        """End it, as a signal does."""
        if self.machine is not None and self.machine.end is not None and self.attempt is not None:
            self.attempt.release()
        self.ended = True
        self.acceptor.close()
        if self.attempt is not None:
            self.attempt.abort()
        self._thread.join()
