"""The ferry: what the libxc format lacks, spoken around the stream on one connection. Sans-I/O.

::

    source                                              destination
      | preamble ------------------------------------------> |
      | <------------------------------------------ preamble |
      | SOURCE_HELLO --------------------------------------> |
      | <----------------- DESTINATION_HELLO (or REFUSE, end) |
      | libxc stream, unframed: headers, records, END -----> |    guest runs until the last round, then is paused
      | <----------------------------------- REACHED, of each FENCE in it
      | DIGESTS ... DIGESTS(last) -------------------------> |
      |                                        compares its own
      | <-------------------------- MISMATCH, if one differs |
      | FAILED(gfn) ---------------------------------------> |    guest stays at the source
      |                                                      |
      | <--------------------------------------------- READY |    if all are equal
      | COMMIT(paused?) -----------------------------------> |    the guest is the destination's
      | <------------------------------------------- RUNNING |

A further connection of the same migration, before the stream begins::

    source                                              destination
      | preambles, as above                                  |
      | JOIN(proof, index) --------------------------------> |
      | <------------------- KNOWN, JOINED (or REFUSE, end)  |
      | a section of the libxc stream, unframed -----------> |

In post-copy some pages are missing when the guest switches; they come when they are asked for::

    source                                              destination
      | MISSING ... DIGESTS ... DIGESTS(last) ------------> |
      | <--------------------------------------------- READY |
      | SWITCH(paused?) -----------------------------------> |
      | <------------------------------------------- RUNNING |
      | <-------------------------------------------- WANTED |
      | PAGES, and their content, unframed ----------------> |    and so on
      | <------------------------------------------ COMPLETE |
      | DROPPED -------------------------------------------> |

    a new connection, when that one was cut:
      | preambles, as above                                  |
      | RECOVER(proof) ------------------------------------> |
      | <------- KNOWN, RECOVERED (or FAILED); or REFUSE: end |
      | <-------------------------------------------- WANTED |

Either side may end it with FAILED when its turn allows (``ferry_order.TABLE``), or by closing the connection.
A destination that sends FAILED promises that the guest has not run there and never will; this holds after COMMIT too.

Use: one :class:`Conversation` per connection and side, with one :class:`FerryEncoder` and one :class:`FerryDecoder`
on it. Call :meth:`Conversation.stream_passed` when the libxc stream is over. Read no more than ``wanted_bytes`` while
the libxc stream may follow (the destination, before it). The three are for one thread at a time: where one thread
sends and another receives, the caller has a lock around every call.
"""

import secrets
from collections.abc import Callable
from struct import Struct
from struct import error as StructError

from pageferry.core.errors import (
    LocalStreamError,
    OrderError,
    RecordError,
    RemoteStreamError,
    TruncatedError,
    VersionError,
)
from pageferry.stream.ferry_bodies import body_of, check_ascent, parse_body
from pageferry.stream.ferry_frames import (
    MAX_BODY_BYTES,
    TYPE_OF,
    Digests,
    Frame,
    FrameType,
)
from pageferry.stream.ferry_order import Conversation, Side, Stage
from pageferry.stream.format import BodyError
from pageferry.stream.intake import NEED_DATA, Intake, Need

MAGIC = b"\x89PGFERRY"
PROTOCOL_VERSION = 3
#: After the magic: version u32, reserved u32; then the nonce.
PREAMBLE_REST = Struct("<II")
NONCE_BYTES = 32
#: type u32, body length u32.
FRAME_HEADER = Struct("<II")
#: How others begin that answer at a wrong port, or call at ours.
_STRANGERS: tuple[tuple[bytes, str], ...] = (
    (b"\xff" * 8, "a bare libxc stream"),
    (b"QEVM", "a QEMU migration stream"),
    (b'{"QMP"', "a QMP control socket"),
    (b"SSH-", "an SSH peer"),
    (b"HTTP/", "an HTTP server"),
    (b"GET ", "an HTTP client"),
    (b"\x15\x03", "a TLS server"),
    (b"\x16\x03", "a TLS client"),
)


class FerryEncoder:
    """Writes our frames, in a legal order or not at all.

    A method that raises has emitted nothing and changed nothing.

    Args:
        conversation: shared with this side's decoder.

    Source: docs/reference/stream.md, part 2.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._greeted = False
        self._digested_to = 0

    def preamble(self) -> bytes:
        """Return the 48 bytes that go first, without waiting for the peer's; the nonce in them is new.

        Raises:
            LocalStreamError: they were sent already.
        """
        if self._greeted:
            raise LocalStreamError("the preamble comes once", record="preamble")
        self._greeted = True
        nonce = self._conversation.nonces[self._conversation.side] = secrets.token_bytes(NONCE_BYTES)
        return MAGIC + PREAMBLE_REST.pack(PROTOCOL_VERSION, 0) + nonce

    def frame(self, frame: Frame) -> bytes:
        """Return a whole frame: header and body.

        Raises:
            LocalStreamError: the frame may not be sent now, or a field is one that the peer would have to refuse.
        """
        frame_type = TYPE_OF[type(frame)]
        conversation = self._conversation
        why = conversation.check(conversation.side, frame_type) if self._greeted else "the preamble comes first"
        if why is not None:
            raise LocalStreamError(why, record=frame_type.name)
        try:
            body = body_of(frame)
            if len(body) > MAX_BODY_BYTES[frame_type]:
                raise BodyError(f"a body of {len(body)} bytes is longer than {MAX_BODY_BYTES[frame_type]}")
            self._digested_to = check_ascent(parse_body(frame_type, body), self._digested_to)
        except BodyError as error:
            raise LocalStreamError(str(error), record=frame_type.name) from error
        except (ValueError, TypeError, OverflowError, StructError) as error:
            raise LocalStreamError("a field cannot be written", record=frame_type.name) from error
        conversation.passed(conversation.side, frame_type, last=isinstance(frame, Digests) and frame.last)
        return FRAME_HEADER.pack(frame_type, len(body)) + body


class FerryDecoder:
    """Reads the peer's frames: feed bytes in any pieces, take frames.

    Once an error was raised every later call raises it again.

    Args:
        conversation: shared with this side's encoder.

    Source: docs/reference/stream.md, part 2.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._intake = Intake()
        self._failure: RemoteStreamError | None = None
        self._digested_to = 0
        self._type = FrameType.FAILED
        self._expect("preamble", len(MAGIC), self._magic)

    @property
    def offset(self) -> int:
        """Bytes of this connection used so far, the libxc stream included (at the destination)."""
        return self._intake.offset + self._stream_bytes

    @property
    def trailing_data(self) -> bytes:
        """Bytes that were fed and are not used."""
        return self._intake.peek(len(self._intake))

    @property
    def wanted_bytes(self) -> int:
        """How many more bytes can be used for the next frame; at least 1 after NEED_DATA, 0 after an error."""
        return 0 if self._failure is not None else max(self._need - len(self._intake), 0)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Give the decoder more of what the peer sent; never bytes of the libxc stream, nor content after PAGES."""
        self._intake.feed(data)

    def content_passed(self, size_bytes: int) -> None:
        """Say that the content after a PAGES frame was received; the offsets of later frames count it."""
        self._intake.offset += size_bytes
        self._record_start += size_bytes

    def next_event(self) -> Frame | Need:
        """Return the peer's next frame, or NEED_DATA.

        Raises:
            VersionError: the peer speaks another version of the protocol.
            OrderError: the peer may not send this frame now.
            RecordError: a frame is malformed or too long.
            RemoteStreamError: any of these, or the peer is not pageferry at all.
        """
        if self._failure is not None:
            raise self._failure
        try:
            while len(self._intake) >= self._need:
                frame = self._step(self._intake.take(self._need))
                if frame is not None:
                    return frame
            return NEED_DATA
        except BodyError as error:
            self._failure = RecordError(str(error), record=self._record, offset=self._record_offset)
            self._failure.__cause__ = error.__cause__
        except RemoteStreamError as error:
            self._failure = error
        raise self._failure

    def eof(self) -> None:
        """Say that the peer sends no more; call it after :meth:`next_event` returned NEED_DATA.

        Raises:
            TruncatedError: the conversation is not over, or a frame is cut.
            RemoteStreamError: the error that was raised before, or the peer is not pageferry at all.
        """
        if self._failure is not None:
            raise self._failure
        had = self._intake.peek(self._need)
        if self._record == "preamble" and had and not MAGIC.startswith(had) and self._intake.offset == 0:
            raise self._not_pageferry(had)
        if had or self._intake.offset != self._record_start:
            raise TruncatedError("the peer closed the connection", record=self._record, offset=self._record_offset)
        if self._conversation.stage not in (Stage.OVER, Stage.CLOSED, Stage.JOINED):
            raise TruncatedError(f"the peer closed the connection while {self._conversation.stage}")

    @property
    def _stream_bytes(self) -> int:
        return self._conversation.stream_bytes if self._conversation.side is Side.DESTINATION else 0

    @property
    def _record_offset(self) -> int:
        return self._record_start + self._stream_bytes

    def _expect(self, record: str, need: int, step: Callable[[bytes], Frame | None]) -> None:
        self._record = record
        self._record_start = self._intake.offset
        self._then(need, step)

    def _then(self, need: int, step: Callable[[bytes], Frame | None]) -> None:
        self._need = need
        self._step = step

    def _magic(self, data: bytes) -> None:
        if data != MAGIC:
            raise self._not_pageferry(data)
        self._then(PREAMBLE_REST.size, self._version)

    def _version(self, data: bytes) -> None:
        version, reserved = PREAMBLE_REST.unpack(data)
        if version != PROTOCOL_VERSION:
            raise VersionError(
                f"the peer speaks version {version} of the protocol and we speak {PROTOCOL_VERSION}",
                record="preamble",
                offset=0,
                hint="run the same release of pageferry on both hosts",
            )
        if reserved:
            raise BodyError("a reserved field is not 0")
        self._then(NONCE_BYTES, self._nonce)

    def _nonce(self, data: bytes) -> None:
        self._conversation.nonces[self._conversation.side.other] = data
        self._expect_frame()

    def _expect_frame(self) -> None:
        self._expect("frame header", FRAME_HEADER.size, self._frame_header)

    def _frame_header(self, data: bytes) -> None:
        number, length = FRAME_HEADER.unpack(data)
        try:
            self._type = FrameType(number)
        except ValueError:
            raise BodyError(f"frame type {number:#x} is not known") from None
        self._record = self._type.name
        sender = self._conversation.side.other
        why = self._conversation.check(sender, self._type)
        if why is not None:
            raise OrderError(why, record=self._record, offset=self._record_offset)
        if length > MAX_BODY_BYTES[self._type]:
            raise BodyError(f"a body of {length} bytes is longer than {MAX_BODY_BYTES[self._type]}")
        self._then(length, self._body)

    def _body(self, data: bytes) -> Frame:
        frame = parse_body(self._type, data)
        self._digested_to = check_ascent(frame, self._digested_to)
        last = isinstance(frame, Digests) and frame.last
        sender = self._conversation.side.other
        why = self._conversation.check(sender, self._type)  # we may have sent something meanwhile
        if why is not None:
            raise OrderError(why, record=self._record, offset=self._record_offset)
        self._conversation.passed(sender, self._type, last=last)
        self._expect_frame()
        return frame

    def _not_pageferry(self, first_bytes: bytes) -> RemoteStreamError:
        begins = f"something that begins with {first_bytes!r}"
        looks_like = next((name for start, name in _STRANGERS if first_bytes.startswith(start)), begins)
        return RemoteStreamError(
            f"the peer is not pageferry; it looks like {looks_like}",
            hint="check host and port; a guest is received by `pageferry receive`",
        )
