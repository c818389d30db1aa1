"""The source's side of a migration, phase by phase.

::

    source                                        destination
      | -- HELLO ------------------------------------> |  makes a machine, or refuses
      | <------------------------------------ HELLO -- |
      |  ENABLE                                         |
      | == pre-copy: CLEAN, then copy, round by round => |  scatters pages into place
      | <--------------- REACHED, after each round --- |
      |  freeze the guest ........................ downtime begins
      | == stop-and-copy: what is dirty ==============> |
      | == state, END ================================> |
      | -- DIGESTS -----------------------------------> |  digests the same pages
      | <------------------------------------ READY -- |  (or MISMATCH: fail closed)
      | -- COMMIT ------------------------------------> |  from here on the source never runs it again by itself
      | <---------------------------------- RUNNING -- |  downtime ends

Where the policy decides for post-copy, what is dirty at the freeze stays here: it is named before DIGESTS, SWITCH
stands for COMMIT, and the destination asks for it afterwards (:mod:`pageferry.engine.postcopy.client`).

What holds when it ends, and what others may ask meanwhile, is :mod:`pageferry.engine.attempt`'s.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator

import numpy as np

from pageferry import __version__
from pageferry.core.errors import (
    GuestAt,
    MigrationError,
    PageferryError,
    PeerError,
    TransportError,
    TruncatedError,
    VmError,
)
from pageferry.core.events import Event, Phase, PostcopyProgress, PostcopyRecovered
from pageferry.core.guest_time import WorkSample
from pageferry.core.policy import Policy, may_switch
from pageferry.core.vm import Vm, VmStatus
from pageferry.engine import features
from pageferry.engine.attempt import HELD
from pageferry.engine.copying import HELD_ROUND_S, Copying
from pageferry.engine.failures import as_migration_error
from pageferry.engine.options import DEFAULT_WIRE, WireOptions
from pageferry.engine.pages.cache import PageCache
from pageferry.engine.pages.encode import PackingCoder, PageCoder, PlainCoder
from pageferry.engine.pages.lane import Lane
from pageferry.engine.pages.lanes import Lanes
from pageferry.engine.postcopy.late_counts import LateCounts
from pageferry.engine.postcopy.recovery import come_back
from pageferry.engine.postcopy.server import LeftBehind
from pageferry.engine.verify import digests as verify
from pageferry.engine.verify.prove import VerifyMode
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S, Channel, Endpoint
from pageferry.engine.wire.connections import join
from pageferry.engine.wire.peer import Peer, PeerFailedError, PeerRefusedError
from pageferry.stream.codec import Encoder
from pageferry.stream.ferry import (
    Commit,
    DestinationHello,
    Frame,
    Mismatch,
    Reached,
    Running,
    Side,
    SourceHello,
    Switch,
)
from pageferry.stream.format import PageType, RecordType
from pageferry.stream.order import Role
from pageferry.stream.packing import Packing, packer
from pageferry.stream.records import StaticDataEnd

#: A destination that fails may cut further connections before it says why; so long we listen.
_LAST_WORDS_S = 1.0


def _ignore(_: Event) -> None:
    """See nothing."""


class Source(Copying):
    """One attempt to move a guest away, phase by phase.

    Args:
        vm: the guest; running or paused.
        endpoint: where the destination listens.
        policy: decides after each round.
        name: what the guest is called, for people.
        timeout_s: how long the connection may stand still.
        verify: see :class:`~pageferry.engine.attempt.Attempt`; so are the rest.
        wire: there.
        hold: there.
        on_event: there.
        work_before: there.
    """

    _peer: Peer
    _agreed: frozenset[RecordType]
    _token = ""

    def __init__(
        self,
        vm: Vm,
        endpoint: Endpoint,
        policy: Policy,
        *,
        name: str = "guest",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        verify: VerifyMode | None = None,
        wire: WireOptions = DEFAULT_WIRE,
        hold: bool = False,
        on_event: Callable[[Event], None] = _ignore,
        work_before: WorkSample | None = None,
    ) -> None:
        super().__init__(vm, policy, verify=verify, wire=wire, hold=hold, on_event=on_event, work_before=work_before)
        self._endpoint = endpoint
        self._name = name
        self._timeout_s = timeout_s

    def _go(self) -> None:
        phase = self._clock.phase
        with phase(Phase.CONNECT):
            peer = self._peer = self._connect()
        with phase(Phase.HELLO):
            self._hello(peer)
        with self._last_words(peer):
            with contextlib.closing(self._lanes):
                with phase(Phase.PRECOPY):
                    self._precopy(peer)
                with phase(Phase.PAUSE):
                    self._pause()
                with phase(Phase.STOP_AND_COPY):
                    self._stop_and_copy()
                with phase(Phase.STATE):
                    self._state(peer)
            with phase(Phase.VERIFY):
                self._verify(peer)
        with phase(Phase.HANDOFF):
            peer = self._handoff(peer)
        if self._left is not None and self._late_counts is not None:
            with phase(Phase.POSTCOPY):
                self._serve(peer, self._left, self._late_counts)
        self._leave()

    def _as_migration_error(self, error: Exception, guest_at: GuestAt) -> MigrationError:
        peer = str(self._endpoint)
        return as_migration_error(
            error, phase=self._clock.current, guest_at=guest_at, peer=peer, timeout_s=self._timeout_s
        )

    def _connect(self) -> Peer:
        return Peer(self._open(), Side.SOURCE)

    def _open(self) -> Channel:
        channel = self._endpoint.connect(self._timeout_s, given_up=lambda: self._cancelled)
        channel.pacer = self._pacer
        with self._commit_lock:
            self._channels.append(channel)
            if self._cancelled:
                raise self._abort("cancelled")
        return channel

    def _hello(self, peer: Peer) -> None:
        peer.greet()
        starts, lengths = self._vm.memory.populated()
        storage = self._vm.memory.storage if self._may_share(peer) else None
        peer.send(
            SourceHello(
                version=__version__,
                memory_bytes=self._vm.memory.size_bytes,
                cpus=self._vm.config.cpus,
                accel=self._vm.accel,
                cpuid=self._vm.cpuid,
                machine=str(self._vm.config.machine),
                migration_id=str(uuid.uuid4()),
                name=self._name,
                populated=verify.hint_runs(starts, lengths),
                populated_pages=int(lengths.sum()),
                features=self._offer(peer),
                connections=self._wire.connections,
            ),
            None if storage is None else storage.fd,
        )
        hello = peer.receive()
        if not isinstance(hello, DestinationHello):
            raise self._unexpected(hello)
        self._peer_accel = hello.accel
        features.check_answer(self._wire, self._offer(peer), hello.features)
        self._shared = features.SHARED_MEMORY in hello.features
        self._token = hello.token
        self._may_switch = features.POSTCOPY in hello.features
        self._agreed = features.records_of(hello.features)
        self._prover.agree(hello.features)
        main = self._lane(peer.channel, self._encoder)
        self._lanes = Lanes(main, [self._join(hello.token, index) for index in range(1, self._wire.connections)])

    def _offer(self, peer: Peer) -> tuple[str, ...]:
        return features.offer(
            self._wire,
            audit=self._prover.may_audit,
            shared=self._may_share(peer),
            postcopy=may_switch(self._policy),
        )

    def _join(self, token: str, index: int) -> Lane:
        channel = self._open()
        join(channel, token, index)
        encoder = Encoder(Role.SECTION)
        channel.send([encoder.header(agreed=self._agreed), encoder.record(StaticDataEnd())])
        return self._lane(channel, encoder)

    def _lane(self, channel: Channel, encoder: Encoder) -> Lane:
        memory, packing = self._vm.memory, self._wire.compress
        coder: PageCoder = PlainCoder(memory, encoder)
        if packing is not Packing.NONE:
            share_bytes = self._wire.delta_cache_bytes // self._wire.connections
            cache = PageCache(share_bytes, memory.gfn_limit) if share_bytes else None
            coder = PackingCoder(memory, encoder, packer(packing), cache)
        says_zero = RecordType.ZERO_PAGES in self._agreed
        return Lane(memory, channel, encoder, coder, says_zero=says_zero, on_sent=self._on_sent)

    def _may_share(self, peer: Peer) -> bool:
        """Whether the destination is on this host and may have our memory instead of a copy."""
        return peer.channel.local and self._vm.memory.storage is not None and self._wire == DEFAULT_WIRE

    def _share(self, peer: Peer) -> None:
        """Stand in for pre-copy where the destination has our memory: nothing of it is sent, not even what is dirty."""
        xalloc = np.array([PageType.XALLOC], np.uint8)  # the format wants to hear of one page, and that it is there
        peer.channel.send([self._encoder.page_data([0], xalloc)])
        if not self._go_on.is_set():
            self.status = HELD
        while not self._go_on.wait(HELD_ROUND_S):
            self._hear(peer)
            self._expect_alive()
        self.status = "active"
        if self._cancelled:
            raise self._abort("cancelled")
        self._stop_reason = "the destination has the same memory"

    def _precopy(self, peer: Peer) -> None:
        self._expect_alive()
        header = self._encoder.header(agreed=self._agreed)
        peer.channel.send([header, *(self._encoder.record(record) for record in self._static_records())])
        if self._shared:
            self._share(peer)
        else:
            self._copy_running()

    def _before_record(self) -> None:
        self._hear(self._peer)
        super()._before_record()

    def _hear(self, peer: Peer, wait_s: float = 0.0) -> None:
        """Raise what the destination says, if it says anything."""
        if peer.channel.readable(wait_s):
            frame = peer.receive()
            if isinstance(frame, Mismatch):
                raise self._prover.mismatch(frame, len(self._sender.rounds))
            raise self._unexpected(frame)

    def _settle(self, number: int) -> None:
        if RecordType.FENCE not in self._agreed:
            return
        self._lanes.send_fence(number)
        frame = self._peer.receive()
        if isinstance(frame, Mismatch):
            raise self._prover.mismatch(frame, number)
        if frame != Reached(number=number):
            raise self._unexpected(frame)

    @contextlib.contextmanager
    def _last_words(self, peer: Peer) -> Iterator[None]:
        """Prefer what the destination says on the first connection to how one of them broke."""
        try:
            yield
        except OSError as error:
            if not isinstance(error, VmError):
                with contextlib.suppress(OSError, TruncatedError):
                    self._hear(peer, _LAST_WORDS_S if self._wire.connections > 1 else 0.0)
            raise

    def _stop_and_copy(self) -> None:
        if not self._shared:
            super()._stop_and_copy()

    def _state(self, peer: Peer) -> None:
        records = self._final_records()
        self._lanes.finish()
        peer.channel.send([self._encoder.record(record) for record in records])
        peer.stream_passed(self._encoder.offset)

    def _verify(self, peer: Peer) -> None:
        spent_s = self._clock.now_s() - self._clock.began_s[Phase.PAUSE] + self._state_s / 2  # it is loaded there
        missing = None if self._left is None else self._left.missing
        if self._left is not None:
            self._left.announce(peer)
        answer = self._prover.look(peer) if self._shared else self._prover.prove(peer, spent_s, missing)
        if answer is not None:
            raise self._unexpected(answer)

    def _handoff(self, peer: Peer) -> Peer:
        """Hand the guest over; return the connection on which the destination may ask for pages."""
        with self._commit_lock:
            if self._cancelled:
                raise self._abort("cancelled")
            paused = self._vm.status is VmStatus.PAUSED
            self._committed = True
        try:
            peer.send(Commit(paused=paused) if self._left is None else Switch(paused=paused))
            answer = peer.receive()
            if not isinstance(answer, Running):
                raise self._unexpected(answer)
        except PeerFailedError:
            self._committed = False  # a destination that says so promises that the guest never runs there
            raise
        except (OSError, PageferryError) as error:
            if self._left is None:
                raise
            self.guest_at = GuestAt.UNKNOWN
            self._pause_postcopy(error)
            peer = self._recovered()
        self._running_at_s = self._clock.now_s()
        self.guest_at = GuestAt.DESTINATION
        return peer

    def _serve(self, peer: Peer, left: LeftBehind, late: LateCounts) -> None:
        """Answer for the pages that are missing there, over as many connections as it takes."""

        def on_progress() -> None:
            progress = PostcopyProgress(
                missing_pages=left.pages, sent_pages=left.sent_pages, urgent_pages=left.urgent_pages
            )
            self._on_event(progress)

        self.status = "postcopy-active"
        if self._recovery.abandoned:  # before the answer to SWITCH was there
            peer.channel.abort()
        while True:
            try:
                late.connected()
                left.serve(peer, on_progress)
                return
            except (OSError, PageferryError, PeerFailedError) as error:
                self._pause_postcopy(error)
            peer = self._recovered()

    def _recovered(self) -> Peer:
        """Wait until somebody says where to connect, and the destination is there.

        Raises:
            PeerFailedError: where the guest is was not known, and it is here.
            TransportError: nobody will say it.
        """
        while (endpoint := self._recovery.wait()) is not None:
            self.status = "postcopy-recover"
            self._endpoint = endpoint
            try:
                peer = come_back(self._open(), self._token)
            except (OSError, PageferryError, PeerFailedError) as error:
                promised = isinstance(error, PeerFailedError) and not isinstance(error, PeerRefusedError)
                if promised and self.guest_at is GuestAt.UNKNOWN:
                    self._committed, self.guest_at = False, GuestAt.SOURCE
                    raise
                self._pause_postcopy(error)
                continue
            self.status = "postcopy-active"
            self._on_event(PostcopyRecovered())
            return peer
        lost = "given up before all pages had gone, and the guest is lost"
        reason = lost if self.guest_at is GuestAt.DESTINATION else self._cut_reason
        raise TransportError(reason, phase=str(self._clock.current), guest_at=self.guest_at)

    def _unexpected(self, frame: Frame) -> PeerError:
        what = f"the destination answered {type(frame).__name__} out of turn"
        at = GuestAt.UNKNOWN if self._committed else GuestAt.SOURCE
        return PeerError(what, phase=str(self._clock.current), guest_at=at)

    def _leave(self) -> None:
        """The guest is gone: free what served its migration; it stays frozen here."""
        self._disarm()
        for channel in self._channels:
            channel.close()
