"""The destination's side of a migration; the conversation is drawn in :mod:`pageferry.engine.source`.

Page data is received straight into the guest's memory. A second thread gives storage to the pages that the source
says it has, ahead of their arrival: on most hosts the first touch of memory costs more than the copy.

Postcondition on success: the guest is here and runs (or is paused, if it was), with all of its memory. Postcondition on
failure: no guest is here, and none ever ran. In post-copy the guest is here and runs before all of its pages are; then
only :meth:`Destination.abort` ends it, and the guest is lost.
"""

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Generic

from pageferry import __version__
from pageferry.core.errors import (
    GuestAt,
    PageferryError,
    PeerError,
    RecordError,
    UsageError,
    VmError,
)
from pageferry.core.events import Event, Phase
from pageferry.core.memory import GuestMemory
from pageferry.core.state import MachineState
from pageferry.core.vm import AnyVm, Vm, VmConfig
from pageferry.engine import features
from pageferry.engine.failures import as_arrival_error
from pageferry.engine.image.room import make_machine
from pageferry.engine.pages.arrivals import Arrivals
from pageferry.engine.pages.populator import Populator
from pageferry.engine.pages.sections import Sections, read_stream
from pageferry.engine.phases import PhaseClock, guarded
from pageferry.engine.postcopy.client import PostcopyClient, refuse_return
from pageferry.engine.postcopy.pager import can_wait
from pageferry.engine.verify.compare import AuditedPages, AuditMismatchError, Comparison, mismatch_of
from pageferry.engine.wire.channel import Channel
from pageferry.engine.wire.connections import Accept, take_in
from pageferry.engine.wire.peer import Peer
from pageferry.stream.codec import Decoder
from pageferry.stream.ferry import (
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
    Side,
    SourceHello,
    Switch,
)
from pageferry.stream.hvm_context import decode_machine_state
from pageferry.stream.records import CpuidPolicy, HvmContext, StaticDataEnd

#: While one source says hello no other can.
_HELLO_TIMEOUT_S = 5.0


def _ignore_event(_: Event) -> None:
    """See nothing."""


def _ignore_arrival(_: Vm, __: str) -> None:
    """Do nothing."""


class Destination(Generic[AnyVm]):
    """One attempt to take a guest in.

    Args:
        channel: the accepted connection; closed at the end.
        make_vm: makes the machine, paused; may raise a PageferryError, which refuses the guest.
        accel: what kind of machine it makes.
        accept: where further connections of the same migration come from; None: it takes one only.
        dropped: the tokens of guests that were to switch to this process, and never ran here; ours is added if so.
        on_event: sees phases begin and end.
        before_run: called with the machine and the guest's name when it is ours, just before it runs.
    """

    def __init__(
        self,
        channel: Channel,
        make_vm: Callable[[VmConfig], AnyVm],
        *,
        accel: str,
        accept: Accept | None = None,
        dropped: set[str] | None = None,
        on_event: Callable[[Event], None] = _ignore_event,
        before_run: Callable[[AnyVm, str], None] = _ignore_arrival,
    ) -> None:
        self._channel = channel
        self._make_vm = make_vm
        self._accel = accel
        self._accept = accept
        self._dropped = set() if dropped is None else dropped
        self._features: tuple[str, ...] = ()
        self._before_run = before_run
        self._on_event = guarded(on_event)
        self._clock = PhaseClock(self._on_event)
        self._peer = Peer(channel, Side.DESTINATION)
        self._ours = False
        self._shared = False
        self._aborted = threading.Event()
        self._token = ""
        self._postcopy: PostcopyClient | None = None
        self._audited: AuditedPages | None = None

    def abort(self) -> None:
        """End the attempt, from any thread; a guest that is ours and not all here is lost."""
        self._aborted.set()
        self._channel.abort()
        if self._postcopy is not None:
            self._postcopy.abort()

    @property
    def missing_pages(self) -> int:
        """How many pages are still at the source; from the switch on it only falls."""
        return 0 if self._postcopy is None else self._postcopy.missing_pages

    @property
    def waits_for_source(self) -> bool:
        """Whether the guest is ours and stands still, for pages of it are at a source that is gone."""
        return self._postcopy is not None and self._postcopy.waits_for_source

    def release(self) -> None:
        """Tell the source, from any thread, that the guest has ended and needs no more of its pages."""
        if self._postcopy is not None:
            self._postcopy.release()

    def run(self) -> AnyVm:
        """Take the guest in; call once.

        Raises:
            MigrationError: no guest is here (``guest_at`` SOURCE, or UNKNOWN to us when the source may still decide).
        """
        vm: AnyVm | None = None
        try:
            with self._failures():
                with self._clock.phase(Phase.HELLO):
                    vm, hello, others = self._hello()
                with Populator(vm.memory, hello.populated), self._clock.phase(Phase.PRECOPY):
                    state = self._receive_stream(vm, hello, others)
                with self._clock.phase(Phase.STATE):
                    vm.load_state(state)
                with self._clock.phase(Phase.VERIFY):
                    self._verify(vm)
                with self._clock.phase(Phase.HANDOFF):
                    self._handoff(vm, hello)
            if self._postcopy is not None:
                with self._clock.phase(Phase.POSTCOPY):
                    self._postcopy.take_all(self._peer)
            else:
                self._channel.close()
            return vm
        except BaseException:
            self._channel.close()
            if self._postcopy is not None:
                self._postcopy.close()
            if vm is not None and not self._ours:
                vm.close()
                if self._postcopy is not None:
                    self._dropped.add(self._token)
            raise

    def see_off(self) -> None:
        """Tell the source, after :meth:`run`, that it may drop its copy; return when it has, or this is aborted."""
        if self._postcopy is not None:
            self._postcopy.see_off()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Tell the peer what went wrong, where it listens, and turn it into a MigrationError."""
        try:
            yield
        except Exception as error:
            raised, told = as_arrival_error(error, phase=self._clock.current)
            if told is not None:
                with contextlib.suppress(OSError, PageferryError):  # the source may be gone, or it may not be our turn
                    self._peer.send(told)
                self._channel.finish()
            if raised is error:
                raise
            raise raised from error

    @property
    def _phase(self) -> str:
        return str(self._clock.current)

    def _unexpected(self, frame: Frame) -> PeerError:
        what = f"the source sent {type(frame).__name__} out of turn"
        return PeerError(what, phase=self._phase, guest_at=GuestAt.SOURCE)

    def _hello(self) -> tuple[AnyVm, SourceHello, list[Channel]]:
        patience_s, self._channel.timeout_s = self._channel.timeout_s, min(self._channel.timeout_s, _HELLO_TIMEOUT_S)
        self._peer.greet()
        hello = self._peer.receive()
        self._channel.timeout_s = patience_s
        if isinstance(hello, Recover):
            raise self._not_here(hello)
        if not isinstance(hello, SourceHello):
            raise self._unexpected(hello)
        try:
            vm, self._shared = make_machine(hello, self._channel, self._make_vm)
        except (UsageError, VmError) as error:
            self._peer.send(Refuse(reason=str(error), hint=error.hint))
            self._channel.finish()
            raise
        try:
            return vm, hello, self._answer(vm, hello)
        except BaseException:
            vm.close()
            raise

    def _not_here(self, recover: Recover) -> PeerError:
        refuse_return(self._peer, dropped=recover.token in self._dropped)
        what = "a source came back for a guest that is not here"
        return PeerError(what, phase=self._phase, guest_at=GuestAt.SOURCE)

    def _answer(self, vm: Vm, hello: SourceHello) -> list[Channel]:
        # Say what is used of the offer; return the further connections.
        offered = features.POSTCOPY in hello.features and self._accept is not None and not self._shared
        postcopy = offered and can_wait(vm)
        self._features = features.agree(
            hello.features, several_connections=self._accept is not None, shared=self._shared, postcopy=postcopy
        )
        if features.AUDIT in self._features:
            self._audited = AuditedPages(vm.memory)
        several = self._accept is not None and features.CONNECTIONS in self._features
        self._token = token = secrets.token_hex(16) if several or postcopy else ""
        self._peer.send(DestinationHello(version=__version__, accel=self._accel, features=self._features, token=token))
        if self._accept is None or not several:
            return []
        return take_in(self._channel, self._accept, token, hello.connections)

    def _receive_stream(self, vm: Vm, hello: SourceHello, others: list[Channel]) -> MachineState:
        try:
            return self._receive(vm, hello, others)
        except AuditMismatchError as error:
            self._peer.send(mismatch_of(vm.memory, error.first_gfn, error.pages))
            raise

    def _receive(self, vm: Vm, hello: SourceHello, others: list[Channel]) -> MachineState:
        memory = vm.memory
        agreed = features.records_of(self._features)
        decoder = Decoder(zero_copy=True, gfn_limit=memory.gfn_limit, agreed=agreed)
        connections = 1 + len(others)
        arrivals = self._arrivals(memory, self._channel, 0, connections)
        context = b""
        policy = CpuidPolicy(leaves=())
        with Sections(
            others,
            lambda channel, index: self._arrivals(memory, channel, index, connections),
            gfn_limit=memory.gfn_limit,
            agreed=agreed,
        ) as sections:

            def reached(number: int) -> None:
                sections.wait_reached(number)
                self._peer.send(Reached(number=number))

            for event in read_stream(self._channel, decoder, arrivals, sections.activity, reached):
                if isinstance(event, CpuidPolicy):
                    policy = event
                elif isinstance(event, StaticDataEnd):
                    if policy.leaves != hello.cpuid:
                        raise RecordError("this is not the CPU of the hello", record="CPUID_POLICY")
                elif isinstance(event, HvmContext):
                    context = event.data
        removed = arrivals.removed | sections.removed()
        if removed.any():
            vm.remove_pages(removed.gfns())
        self._peer.stream_passed(decoder.offset)
        return decode_machine_state(context)

    def _arrivals(self, memory: GuestMemory, channel: Channel, index: int, connections: int) -> Arrivals:
        return Arrivals(
            memory,
            channel,
            self._audited,
            index=index,
            connections=connections,
            packing=features.packing_of(self._features),
        )

    def _verify(self, vm: Vm) -> None:
        comparison, mismatch = self._comparison(vm.memory), None
        while True:
            frame = self._peer.receive()
            if isinstance(frame, Missing) and features.POSTCOPY in self._features and not comparison.begun:
                comparison.take_missing(frame)
                continue
            if not isinstance(frame, Digests):
                raise self._unexpected(frame)
            if mismatch is None:
                mismatch = comparison.compare(frame)
                if mismatch is not None:
                    self._peer.send(mismatch)
            if frame.last:
                break
        if mismatch is None:
            verified_pages = comparison.conclude()
            if comparison.missing.any() and self._accept is not None:
                self._postcopy = PostcopyClient(
                    vm,
                    comparison.missing,
                    accept=self._accept,
                    token=self._token,
                    aborted=self._aborted,
                    on_event=self._on_event,
                )
            self._peer.send(Ready(verified_pages=verified_pages))

    def _comparison(self, memory: GuestMemory) -> Comparison:
        return Comparison(memory, self._audited, shared=self._shared)

    def _handoff(self, vm: AnyVm, hello: SourceHello) -> None:
        commit = self._peer.receive()
        if not isinstance(commit, Commit if self._postcopy is None else Switch):
            raise self._unexpected(commit)
        self._before_run(vm, hello.name)
        if not commit.paused:
            vm.resume()
        self._ours = True  # whether or not the source hears of it
        with contextlib.suppress(OSError):
            self._peer.send(Running())
