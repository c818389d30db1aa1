"""The destination's side of a migration, phase by phase.

::

    destination                                   source
      | <------------------------------------ HELLO -- |
      | -- HELLO: what is used of its offer ---------> |  or REFUSE: no such guest here
      | <------------- JOIN, on each further connection |
      | <= pre-copy: pages, round by round ============ |  scattered straight into guest memory
      | -- REACHED: all of a round is in place ------> |
      |                                                | freezes the guest: downtime begins
      | <= stop-and-copy: pages, state, END =========== |
      |  loads the state                               |
      | <---------------------------------- DIGESTS -- |  digests the same pages, and compares
      | -- READY: all are equal ---------------------> |  or MISMATCH: the guest stays at the source
      | <----------------------------------- COMMIT -- |
      |  takes its disks; the guest is ours, and runs  |
      | -- RUNNING ----------------------------------> |  downtime ends
      | <---------------------------------- DROPPED -- |

Where the source decides for post-copy, MISSING comes before DIGESTS, and SWITCH in place of COMMIT: the guest runs
while pages of it are at the source (:mod:`pageferry.engine.postcopy.client`). COMMIT and SWITCH are accepted for as
long as the source stands by them, as its hello says (:mod:`pageferry.engine.handoff.custody`).

Postcondition on success: the guest is here and runs (or is paused, if it was), with all of its memory. Postcondition on
failure: no guest is here, and none ever ran. In post-copy the guest is here and runs before all of its pages are; then
only :meth:`Destination.abort` ends it, and the guest is lost.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NoReturn

from pageferry.core.errors import GuestAt, PageferryError, PeerError, RecordError, UsageError, VmError
from pageferry.core.events import Event, Phase, Warned
from pageferry.core.host_cpu import HostCpu, cpu_warning
from pageferry.core.state import MachineState
from pageferry.core.version import __version__
from pageferry.core.vm import AnyVm, Vm, VmConfig
from pageferry.engine import features
from pageferry.engine.failures import as_arrival_error
from pageferry.engine.handoff.custody import DestinationCustody, Takeover
from pageferry.engine.handoff.take import answer_return, see_off, take
from pageferry.engine.pages.populate import Populator
from pageferry.engine.pages.receive import Receiver
from pageferry.engine.postcopy.client import PostcopyClient
from pageferry.engine.postcopy.pager import can_wait
from pageferry.engine.progress import PhaseClock, guarded
from pageferry.engine.room import make_machine
from pageferry.engine.verify.compare import AuditMismatchError, Comparison, ReceivedPages, mismatch_of
from pageferry.engine.wire.channel import Channel
from pageferry.engine.wire.connections import Accept, NeverRan, take_in, wait_for_return
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry_frames import (
    Commit,
    DestinationHello,
    Digests,
    Frame,
    Missing,
    Reached,
    Ready,
    Recover,
    Refuse,
    Running,
    SourceHello,
    Switch,
)
from pageferry.stream.hvm_context import decode_machine_state
from pageferry.stream.records import CpuidPolicy, Fence, HvmContext, StaticDataEnd

#: How long a source may take to say hello that was not heard before; no other is taken in meanwhile.
_HELLO_TIMEOUT_S = 5.0
#: How long a source may take to hear that its guest runs here, before we believe that it has not.
_LAST_WORD_S = 1.0


def _ignore_event(_: Event) -> None:
    """See nothing."""


def _ignore_arrival(_: Vm, __: str) -> None:
    """Do nothing."""


def _say_nothing(_: Peer) -> None:
    """Wait for what the source says."""


def _ignore_completion() -> None:
    """Do nothing."""


class Destination(Generic[AnyVm]):
    """One attempt to take a guest in.

    Args:
        peer: the source, which has connected, and was perhaps heard already; its connection is closed at the end.
        make_vm: makes the machine, paused; may raise a PageferryError, which refuses the guest.
        host_cpu: tells the CPU under the machine that was made; None: not known.
        accept: where further connections of the same migration come from, and its source after a cut.
        never_ran: the guests that were to come to this process, and never will; this one is added if so.
        asked_within_s: how long a source that has not heard that its guest is here may come back and ask.
        on_event: sees phases begin and end.
        before_run: called with the machine and the guest's name when it is ours, just before it runs.
        on_complete: called when all of the guest is here, before its source is told to drop its copy.
    """

    def __init__(
        self,
        peer: Peer,
        make_vm: Callable[[VmConfig], AnyVm],
        *,
        host_cpu: Callable[[AnyVm], HostCpu | None] = lambda _: None,
        accept: Accept,
        never_ran: NeverRan | None = None,
        asked_within_s: float = 60.0,
        on_event: Callable[[Event], None] = _ignore_event,
        before_run: Callable[[AnyVm, str], None] = _ignore_arrival,
        on_complete: Callable[[], None] = _ignore_completion,
    ) -> None:
        self._peer = peer
        self._channel = peer.channel
        self._host = peer.channel.host
        self._channels = [peer.channel]
        self._make_vm = make_vm
        self._host_cpu = host_cpu
        self._accept = accept
        self._never_ran = NeverRan() if never_ran is None else never_ran
        self._asked_within_s = asked_within_s
        self._on_event = guarded(on_event)
        self._before_run = before_run
        self._on_complete = guarded(on_complete)
        self._clock = PhaseClock(self._on_event, self._host.now_s)
        self._aborted = self._host.event()
        self._takeover: Takeover | None = None  # from the hello on
        self._token = secrets.token_hex(16)
        self._postcopy: PostcopyClient | None = None  # from just before the switch on

    def run(self) -> AnyVm:
        """Take the guest in; call once.

        This returns when the source has heard that it may drop its copy, over as many connections as that takes, or
        when the attempt is aborted after all pages have come.

        Raises:
            MigrationError: no guest is here (``guest_at`` SOURCE), or the one that was here is lost (DESTINATION).
        """
        with contextlib.ExitStack() as undo, self._failures():
            undo.callback(self._channel.close)
            with self._clock.phase(Phase.HELLO):
                hello = self._hello()
                vm, shared = self._machine(hello)
                undo.callback(vm.close)
                takeover = self._takeover = Takeover(hello.lease_ms / 1e3)
                undo.callback(self._never_ran.add, self._token)
                agreed = self._answer(hello, vm, shared=shared)
                channels = self._channels = [self._channel, *self._join(hello, agreed)]
                for joined in channels[1:]:
                    undo.callback(joined.close)
                pages = ReceivedPages(vm.memory, audits=features.AUDIT in agreed)
            populator = Populator(vm.memory, hello.populated, lambda: pages.arrived_pages, self._host)
            with populator, self._clock.phase(Phase.PRECOPY):
                state = self._receive(hello, agreed, channels, pages)
                if (removed := pages.removed()).size:
                    vm.remove_pages(removed)
            with self._clock.phase(Phase.STATE):
                vm.load_state(state)
            with self._clock.phase(Phase.VERIFY):
                comparison = Comparison(pages, shared=shared)
                self._compare(comparison, agreed)
                verified_pages = comparison.conclude()
                if comparison.missing.any():
                    self._postcopy = self._begin_postcopy(vm, comparison)
                    undo.callback(self._postcopy.close)

            def start(paused: bool) -> None:
                if self._aborted.is_set():
                    what = "the destination ended the attempt before the guest ran there"
                    raise PeerError(what, phase=str(Phase.HANDOFF), guest_at=GuestAt.SOURCE)
                self._before_run(vm, hello.name)
                vm.memory.advice.end_arrival()
                if not paused:
                    vm.resume()
                undo.pop_all()  # the guest is ours, whether or not the source hears of it

            with self._clock.phase(Phase.HANDOFF):
                word, ready = Commit if self._postcopy is None else Switch, Ready(verified_pages=verified_pages)
                disks = vm.claim_backends, vm.release_backends
                take(self._peer, takeover, ready, word, *disks, start, self._clock.now_s)
        if self._postcopy is not None:
            with self._clock.phase(Phase.POSTCOPY):
                self._postcopy.take_all(self._peer)
        self._on_complete()
        self._see_off()
        return vm

    def _see_off(self) -> None:
        if self._postcopy is not None:
            self._postcopy.see_off()
            return
        until_s = self._clock.now_s() + self._asked_within_s

        def given_up() -> bool:
            return self._aborted.is_set() or self._clock.now_s() >= until_s

        def returned() -> Peer | None:
            return wait_for_return(self._accept, self._token, Running(), given_up)

        see_off(self._peer, _say_nothing, returned, _LAST_WORD_S)

    def release(self) -> None:
        """Tell the source, from any thread, that the guest has ended and needs no more of its pages."""
        if self._postcopy is not None:
            self._postcopy.release()

    def abort(self) -> None:
        """End the attempt, from any thread.

        A guest that does not run here yet never will. One that is ours and not all here is lost.
        """
        self._aborted.set()
        self._channel.abort()
        if self._postcopy is not None:
            self._postcopy.abort()

    @property
    def missing_pages(self) -> int:
        """How many pages are still at the source; from the switch on it only falls."""
        return 0 if self._postcopy is None else self._postcopy.missing_pages

    @property
    def silent_s(self) -> float:
        """For how long nothing has come from the source, on any connection."""
        channels = tuple(self._channels)
        if self._postcopy is not None and (channel := self._postcopy.channel) is not None:
            channels = (channel,)
        return min(channel.unmoved_s for channel in channels)

    @property
    def waits_for_source(self) -> bool:
        """Whether the guest is ours and stands still because pages of it are at a source that is gone."""
        return self._postcopy is not None and self._postcopy.waits_for_source

    # -- hello -----------------------------------------------------------------------------------------------------

    def _hello(self) -> SourceHello:
        hello = self._peer.hear(self._host.now_s() + _HELLO_TIMEOUT_S)
        if isinstance(hello, Recover):
            token = next((token for token in self._never_ran if self._peer.proves(hello, token)), None)
            if token is not None:
                self._peer.say_known(token)
            answer_return(self._peer, never_ran=token is not None)
            self._channel.finish()
            what = "a source came back for a guest that is not here"
            raise PeerError(what, phase=str(Phase.HELLO), guest_at=GuestAt.SOURCE)
        if not isinstance(hello, SourceHello):
            raise self._unexpected(hello)
        return hello

    def _machine(self, hello: SourceHello) -> tuple[AnyVm, bool]:
        """Return the machine, and whether its memory is the source's; or refuse the guest."""
        try:
            return make_machine(hello, self._channel, self._make_vm)
        except (UsageError, VmError) as error:
            self._peer.send(Refuse(reason=str(error), hint=error.hint))
            self._channel.finish()
            raise

    def _answer(self, hello: SourceHello, vm: AnyVm, *, shared: bool) -> tuple[str, ...]:
        """Say what is used of the offer, and return it."""
        agreed = features.agree(
            hello.features,
            shared=shared,
            postcopy=not shared and features.POSTCOPY in hello.features and can_wait(vm),
        )
        host_cpu = self._host_cpu(vm)
        self._peer.send(
            DestinationHello(version=__version__, accel=vm.accel, features=agreed, token=self._token, host_cpu=host_cpu)
        )
        if (warning := cpu_warning(hello.host_cpu, host_cpu)) is not None:
            self._on_event(Warned(text=warning))
        return agreed

    def _join(self, hello: SourceHello, agreed: tuple[str, ...]) -> list[Channel]:
        if features.CONNECTIONS not in agreed:
            return []
        return take_in(self._channel, self._accept, self._token, hello.connections)

    # -- pages and state -------------------------------------------------------------------------------------------

    def _receive(
        self, hello: SourceHello, agreed: tuple[str, ...], channels: Sequence[Channel], pages: ReceivedPages
    ) -> MachineState:
        context, policy = b"", CpuidPolicy(leaves=())
        records, packing = features.records_of(agreed), features.packing_of(agreed)
        try:
            with Receiver(channels, pages, agreed=records, packing=packing) as receiver:
                for event in receiver.events():
                    if isinstance(event, Fence):
                        self._peer.send(Reached(number=event.number))
                    elif isinstance(event, CpuidPolicy):
                        policy = event
                    elif isinstance(event, StaticDataEnd):
                        if policy.leaves != hello.cpuid:
                            raise RecordError("this is not the CPU of the hello", record="CPUID_POLICY")
                    elif isinstance(event, HvmContext):
                        context = event.data
        except AuditMismatchError as error:
            self._peer.send(mismatch_of(pages.memory, error.first_gfn, error.pages))
            raise
        self._peer.stream_passed(receiver.stream_bytes)
        return decode_machine_state(context)

    # -- proof and handoff -----------------------------------------------------------------------------------------

    def _compare(self, comparison: Comparison, agreed: tuple[str, ...]) -> None:
        """Hear which pages are missing, and compare all digests. A mismatch is told, and the source then fails."""
        last = False
        while not last:
            frame = self._peer.receive()
            if isinstance(frame, Missing) and features.POSTCOPY in agreed and not comparison.begun:
                comparison.take_missing(frame)
            elif isinstance(frame, Digests):
                last = frame.last
                if (mismatch := comparison.compare(frame)) is not None:
                    self._peer.send(mismatch)
                    self._hear_failed()
            else:
                raise self._unexpected(frame)

    def _hear_failed(self) -> NoReturn:
        while isinstance(frame := self._peer.receive(), Digests):
            pass  # sent before the source heard of the mismatch
        raise self._unexpected(frame)

    def _begin_postcopy(self, vm: Vm, comparison: Comparison) -> PostcopyClient:
        return PostcopyClient(
            vm,
            comparison.missing,
            accept=self._accept,
            token=self._token,
            aborted=self._aborted,
            on_event=self._on_event,
            host=self._host,
        )

    # -- failures --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Tell the peer what went wrong, where it listens, and turn it into a MigrationError."""
        try:
            yield
        except Exception as error:
            if self._takeover is not None and self._takeover.custody is not DestinationCustody.OURS:
                self._takeover.give_up()
            raised, told = as_arrival_error(error, phase=self._clock.current)
            if told is not None:
                with contextlib.suppress(OSError, PageferryError):  # the source may be gone, or it may not be our turn
                    self._peer.send(told)
                self._channel.finish()
            if raised is error:
                raise
            raise raised from error

    def _unexpected(self, frame: Frame) -> PeerError:
        what = f"the source sent {type(frame).__name__} out of turn"
        return PeerError(what, phase=str(self._clock.current), guest_at=GuestAt.SOURCE)
