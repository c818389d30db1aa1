"""Every exception that pageferry raises on purpose.

A message carries the error's own fields and never its cause's text; the cause is chained with ``raise ... from`` and
round or record numbers are added with ``add_note``.
"""

import errno as errno_names
import os
from collections.abc import Sequence
from enum import StrEnum


class GuestAt(StrEnum):
    """Where the one guest is after a migration attempt ended: the fact that an operator needs first."""

    SOURCE = "source"
    DESTINATION = "destination"
    UNKNOWN = "unknown"


class PageferryError(Exception):
    """Base of every error that pageferry raises on purpose.

    Args:
        message: one line for a person.
        hint: what to do about it, one line, or "".
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(PageferryError):
    """The caller asked for something that cannot be meant: a size, a name, a file, a state that does not fit."""


class VmError(PageferryError):
    """A guest, its memory or its machine refused an operation."""


class RefusedError(VmError):
    """A guest cannot do what was asked as it is now; nothing has failed."""


class GuestCrash(VmError):
    """The guest did something that no machine survives (as a triple fault). Never our own failure."""


class LogDirtyError(VmError):
    """A log-dirty operator was called in a state that does not allow it, or could not keep its promise."""


class LogDirtyMemoryError(LogDirtyError):
    """The domain's paging pool has no room for what log-dirty needs."""


class LostPageError(LogDirtyError):
    """A tracker and its witness disagree: one of them did not report pages whose content changed.

    Args:
        gfns: the frames, ascending, at least one; ``gfn`` is the first.
        round_index: the round in which the first was seen to change, from 0.
        lost_by: the tracker that did not report them.
        seen_by: who saw the first: the other tracker, or ``digests``.
    """

    def __init__(self, gfns: Sequence[int], *, round_index: int, lost_by: str, seen_by: str) -> None:
        more = f" (and {len(gfns) - 1} more)" if len(gfns) > 1 else ""
        super().__init__(
            f"oracle: gfn {gfns[0]:#x}{more} changed in round {round_index}; {lost_by} lost it, {seen_by} saw it",
            hint=f"a dirty bit was lost: do not migrate with {lost_by} on this host, and report it",
        )
        self.gfns = tuple(gfns)
        self.gfn = gfns[0]
        self.round_index = round_index
        self.lost_by = lost_by
        self.seen_by = seen_by


class P2MError(VmError):
    """The physical-to-machine table refused an operation on one frame."""

    def __init__(self, message: str, *, gfn: int, p2m_type: str = "") -> None:
        super().__init__(f"{message}: gfn {gfn:#x}" + (f" ({p2m_type})" if p2m_type else ""))
        self.gfn = gfn
        self.p2m_type = p2m_type


class _OsVmError(VmError, OSError):
    """A kernel call refused; both a VmError and an OSError (``errno`` is set)."""

    def __init__(self, call: str, errno: int, *, hint: str = "") -> None:
        name = errno_names.errorcode.get(errno, str(errno))
        super().__init__(f"{call}: {name} ({os.strerror(errno)})", hint=hint)
        self.call = call
        self.errno = errno


class KvmError(_OsVmError):
    """An ioctl on ``/dev/kvm`` or one of its descriptors failed; ``call`` names it."""


class UffdError(_OsVmError):
    """A ``userfaultfd`` or ``PAGEMAP_SCAN`` call failed; ``call`` names it."""


class XenError(_OsVmError):
    """A hypercall, or a call of one of Xen's devices, failed; ``call`` names it."""


class UnsupportedError(VmError):
    """This host, kernel or build lacks a capability; ``capability`` names it."""

    def __init__(self, capability: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.capability = capability


class StreamError(PageferryError):
    """A migration stream is wrong; ``record`` names the record and ``offset`` is its first byte, where known.

    ``reason`` is the message without them.
    """

    def __init__(self, message: str, *, record: str = "", offset: int | None = None, hint: str = "") -> None:
        place = [f"in {record}" if record else "", "" if offset is None else f"at byte {offset}"]
        where = " ".join(filter(None, place))
        super().__init__(f"{message} ({where})" if where else message, hint=hint)
        self.reason = message
        self.record = record
        self.offset = offset


class LocalStreamError(StreamError):
    """We tried to emit something that the format forbids: our own bug, found before the peer sees it."""


class RemoteStreamError(StreamError):
    """The peer or the file sent something that the format forbids."""


class TruncatedError(RemoteStreamError):
    """The stream ended in the middle."""


class VersionError(RemoteStreamError):
    """The stream or the protocol has a version that we do not speak."""


class RecordError(RemoteStreamError):
    """One record is malformed: its type, length, fields or a gfn outside the guest."""


class OrderError(RemoteStreamError):
    """A record came where it must not."""


class VerifyError(RemoteStreamError):
    """The destination's memory is not the source's; ``gfn`` is the first frame that differs."""

    def __init__(self, message: str, *, gfn: int | None) -> None:
        super().__init__(message if gfn is None else f"{message}: first difference at gfn {gfn:#x}")
        self.gfn = gfn


class MigrationError(PageferryError):
    """A migration failed; ``guest_at`` says where the guest is.

    SOURCE: it did not move. UNKNOWN: the commit or the switch was not answered. DESTINATION: it moved by post-copy, and
    the connection or a process ended before all of its pages had come.

    Args:
        message: one line for a person.
        phase: the engine phase in which it ended.
        guest_at: where the guest is now.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, phase: str, guest_at: GuestAt, hint: str = "") -> None:
        super().__init__(f"{message} (phase {phase}, guest at {guest_at})", hint=hint)
        self.reason = message
        self.phase = phase
        self.guest_at = guest_at


class TransportError(MigrationError):
    """The connection could not be made, was cut, or stalled."""


class PeerError(MigrationError):
    """The peer refused or reported a failure of its own."""


class PolicyAbort(MigrationError):
    """The policy, a cancel request or the guest's own end stopped the migration; nothing was wrong."""
