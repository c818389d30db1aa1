"""Turns failures into the words of a migration: the phase, where the guest is, and one line for a person."""

from pageferry.core.errors import (
    GuestAt,
    MigrationError,
    PageferryError,
    PeerError,
    RemoteStreamError,
    TransportError,
    TruncatedError,
    UsageError,
    VerifyError,
    VmError,
)
from pageferry.core.events import Phase
from pageferry.core.os_hints import connect_hint, is_resource, resource_hint
from pageferry.engine.wire.peer import PeerFailedError
from pageferry.engine.wire.tls_errors import TlsError
from pageferry.stream.ferry_frames import Failed


class ConnectError(OSError):
    """A connection was not made, whatever phase it was for; ``cause`` is the error of the attempt."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause.errno, cause.strerror or str(cause))
        self.cause = cause


class StalledError(TimeoutError):
    """The other side did not answer within ``limit_s``, which is another time than the migration's own."""

    def __init__(self, limit_s: float) -> None:
        super().__init__("stalled")
        self.limit_s = limit_s


def as_migration_error(
    error: Exception, *, phase: Phase, guest_at: GuestAt, peer: str, timeout_s: float
) -> MigrationError:
    """Return the MigrationError that the caller raises from ``error``.

    Args:
        error: anything that a phase may raise, a MigrationError excepted.
        phase: in which it was raised.
        guest_at: where the guest is now.
        peer: the address of the other side.
        timeout_s: how long it was allowed to stand still.
    """
    if isinstance(error, PeerFailedError):
        return PeerError(str(error), phase=str(phase), guest_at=guest_at, hint=error.hint)
    if isinstance(error, VmError | UsageError):  # before OSError: a KvmError is both, and no fault of the connection
        return MigrationError(str(error), phase=str(phase), guest_at=guest_at, hint=error.hint)
    if isinstance(error, TlsError):
        return TransportError(f"{peer}: {error}", phase=str(phase), guest_at=guest_at, hint=error.hint)
    if isinstance(error, TruncatedError | OSError):
        reason, hint = _broken(error, peer, timeout_s)
        return TransportError(reason, phase=str(phase), guest_at=guest_at, hint=hint)
    if isinstance(error, RemoteStreamError):
        return PeerError(str(error), phase=str(phase), guest_at=guest_at, hint=error.hint)
    return MigrationError(f"internal error: {error!r}", phase=str(phase), guest_at=guest_at)


def as_arrival_error(error: Exception, *, phase: Phase) -> tuple[MigrationError, Failed | None]:
    """Return what a destination raises from ``error`` (or is, a MigrationError), and what it tells the source first.

    Args:
        error: anything that a phase may raise before the guest runs here.
        phase: in which it was raised.

    Returns:
        The error; ``guest_at`` is SOURCE, unless it knows better. None in place of words for the source: it has said
        the last one itself, or is gone.
    """
    where, at = str(phase), GuestAt.SOURCE
    if isinstance(error, PeerFailedError):
        return PeerError(str(error), phase=where, guest_at=at, hint=error.hint), None
    if isinstance(error, MigrationError):
        return error, Failed(reason=error.reason, hint=error.hint)
    if isinstance(error, TruncatedError):
        return TransportError(f"the connection was cut: {error}", phase=where, guest_at=at), None
    if isinstance(error, PageferryError):  # before OSError, as above
        kind = PeerError if isinstance(error, RemoteStreamError) else MigrationError
        gfn = error.gfn if isinstance(error, VerifyError) else None
        said = Failed(reason=str(error), hint=error.hint, gfn=gfn)
        return kind(str(error), phase=where, guest_at=at, hint=error.hint), said
    if isinstance(error, OSError) and is_resource(error):
        what, hint = (
            f"the destination is out of a resource: {error.strerror}",
            f"at the destination: {resource_hint(error)}",
        )
        return MigrationError(what, phase=where, guest_at=at, hint=hint), Failed(reason=what, hint=hint)
    if isinstance(error, OSError):
        stalled = isinstance(error, TimeoutError)
        what = "the source stood still" if stalled else "the connection was cut"
        told = Failed(reason=f"{what} too long") if stalled else None  # it may be there, behind a network that stalls
        return TransportError(what, phase=where, guest_at=at), told
    what = f"internal error: {error!r}"
    return MigrationError(what, phase=where, guest_at=at), Failed(reason=what)


def _broken(error: OSError | TruncatedError, peer: str, timeout_s: float) -> tuple[str, str]:
    # What to say, and what to do about it.
    connected = not isinstance(error, ConnectError)
    error = error.cause if isinstance(error, ConnectError) else error
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if isinstance(error, OSError) and is_resource(error):
        return f"the source is out of a resource: {why}", f"at the source: {resource_hint(error)}"
    if not connected and isinstance(error, OSError):
        path = peer.removeprefix("unix:") if peer.startswith("unix:") else ""
        return f"cannot connect to {peer}: {why}", connect_hint(error, path=path)
    if isinstance(error, TimeoutError):
        limit_s = round(error.limit_s, 1) if isinstance(error, StalledError) else timeout_s
        return f"the connection to {peer} stood still for {limit_s:g} s", ""
    return f"the connection to {peer} was cut: {why}", ""
