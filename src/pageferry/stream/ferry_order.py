"""The conversation around the libxc stream: whose turn it is, as one table for both sides.

Each side keeps one :class:`Conversation` for both directions, so that an answer to something that was not yet said
(READY before the last digests, RUNNING before COMMIT) is as wrong as a frame out of order.
"""

from enum import StrEnum

from pageferry.core.errors import LocalStreamError
from pageferry.stream.ferry_frames import FrameType

_F = FrameType


class Side(StrEnum):
    """One end of the connection."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def other(self) -> "Side":
        """The other end."""
        return Side.DESTINATION if self is Side.SOURCE else Side.SOURCE


class Stage(StrEnum):
    """How far the conversation is, as one side sees it."""

    GREETING = "greeting"
    ANSWERING = "answering"
    STREAMING = "streaming"
    DIGESTING = "digesting"
    COMPARING = "comparing"
    MISMATCHED = "mismatched"
    READY = "ready"
    COMMITTED = "committed"
    RUNNING = "running"
    OVER = "over"
    CLOSED = "closed"
    JOINING = "joining"
    JOINED = "joined"
    SWITCHED = "switched"
    FETCHING = "fetching"
    COMPLETE = "complete"
    RECOVERING = "recovering"
    JOIN_KNOWN = "known, and joining"
    RECOVER_KNOWN = "known, and recovering"


_P, _S, _D = Stage, Side.SOURCE, Side.DESTINATION
#: Where a destination can no longer promise that the guest never runs there, or no source waits for the promise, or any
#: peer could say it.
_NO_PROMISE = (_P.RUNNING, _P.OVER, _P.CLOSED, _P.JOINED, _P.FETCHING, _P.COMPLETE, _P.RECOVERING)

#: (stage, sender, frame) -> next stage. DIGESTS stands for all but the last; ``LAST_DIGESTS`` has the last.
#: What is missing may not be sent. STREAMING ends by :meth:`Conversation.stream_passed`, not by a frame; on a further
#: connection nothing is said after JOINED: a section of the stream follows.
TABLE: dict[tuple[Stage, Side, FrameType], Stage] = {
    (_P.GREETING, _S, _F.SOURCE_HELLO): _P.ANSWERING,
    (_P.GREETING, _D, _F.REFUSE): _P.CLOSED,  # the hello is not even read, or cannot be
    (_P.ANSWERING, _D, _F.DESTINATION_HELLO): _P.STREAMING,
    (_P.ANSWERING, _D, _F.REFUSE): _P.CLOSED,
    (_P.STREAMING, _D, _F.MISMATCH): _P.CLOSED,  # of an AUDIT record; the source can only close
    (_P.STREAMING, _D, _F.REACHED): _P.STREAMING,  # of a FENCE record
    (_P.DIGESTING, _S, _F.DIGESTS): _P.DIGESTING,
    (_P.DIGESTING, _D, _F.MISMATCH): _P.MISMATCHED,
    (_P.COMPARING, _D, _F.MISMATCH): _P.MISMATCHED,
    (_P.COMPARING, _D, _F.READY): _P.READY,
    (_P.MISMATCHED, _S, _F.DIGESTS): _P.MISMATCHED,  # they were under way
    (_P.READY, _S, _F.COMMIT): _P.COMMITTED,
    (_P.COMMITTED, _D, _F.RUNNING): _P.RUNNING,
    (_P.RUNNING, _S, _F.DROPPED): _P.OVER,
    (_P.GREETING, _S, _F.JOIN): _P.JOINING,
    (_P.JOINING, _D, _F.KNOWN): _P.JOIN_KNOWN,
    (_P.JOIN_KNOWN, _D, _F.JOINED): _P.JOINED,
    (_P.JOINING, _D, _F.REFUSE): _P.CLOSED,
    (_P.DIGESTING, _S, _F.MISSING): _P.DIGESTING,
    (_P.READY, _S, _F.SWITCH): _P.SWITCHED,
    (_P.SWITCHED, _D, _F.RUNNING): _P.FETCHING,
    (_P.FETCHING, _D, _F.WANTED): _P.FETCHING,
    (_P.FETCHING, _S, _F.PAGES): _P.FETCHING,
    (_P.FETCHING, _D, _F.COMPLETE): _P.COMPLETE,
    (_P.COMPLETE, _S, _F.PAGES): _P.COMPLETE,  # they were under way to a guest that has ended
    (_P.COMPLETE, _S, _F.DROPPED): _P.OVER,
    (_P.GREETING, _S, _F.RECOVER): _P.RECOVERING,
    (_P.RECOVERING, _D, _F.KNOWN): _P.RECOVER_KNOWN,
    (_P.RECOVER_KNOWN, _D, _F.RECOVERED): _P.FETCHING,
    (_P.RECOVER_KNOWN, _D, _F.RUNNING): _P.RUNNING,
    (_P.RECOVERING, _D, _F.REFUSE): _P.CLOSED,
    **{(p, _S, _F.FAILED): _P.CLOSED for p in (_P.DIGESTING, _P.COMPARING, _P.MISMATCHED, _P.READY)},
    **{(p, _D, _F.FAILED): _P.CLOSED for p in Stage if p not in _NO_PROMISE},
}
LAST_DIGESTS: dict[Stage, Stage] = {_P.DIGESTING: _P.COMPARING, _P.MISMATCHED: _P.MISMATCHED}


class Conversation:
    """Where one side is in the conversation; shared by its encoder and its decoder.

    Args:
        side: which end we are.
    """

    __slots__ = ("nonces", "side", "stage", "stream_bytes")

    def __init__(self, side: Side) -> None:
        self.side = side
        self.stage = Stage.GREETING
        self.stream_bytes = 0
        self.nonces: dict[Side, bytes] = {}

    def check(self, sender: Side, frame_type: FrameType) -> str | None:
        """Return why ``sender`` may not send this frame now, or None when it may."""
        if (self.stage, sender, frame_type) in TABLE:
            return None
        return f"the {sender} may not send it while {self.stage}"

    def passed(self, sender: Side, frame_type: FrameType, *, last: bool = False) -> None:
        """Move on after a frame that :meth:`check` allowed; ``last`` says that it is the last DIGESTS."""
        self.stage = LAST_DIGESTS[self.stage] if last else TABLE[self.stage, sender, frame_type]

    def stream_passed(self, stream_bytes: int) -> None:
        """Say that the libxc stream is over: END was sent (source) or taken (destination).

        Args:
            stream_bytes: the stream's length; the offsets of later frames count it.

        Raises:
            LocalStreamError: it is not the stream's turn.
        """
        if self.stage is not Stage.STREAMING:
            raise LocalStreamError(f"the libxc stream cannot end while {self.stage}")
        self.stage = Stage.DIGESTING
        self.stream_bytes = stream_bytes
