"""What a destination raises when something goes wrong, and what it tells the source first."""

import errno
import socket

import pytest

from pageferry.core.errors import (
    GuestAt,
    KvmError,
    MigrationError,
    PeerError,
    RecordError,
    TransportError,
    TruncatedError,
    UsageError,
    VerifyError,
)
from pageferry.core.events import Phase
from pageferry.engine.failures import ConnectError, StalledError, as_arrival_error, as_migration_error
from pageferry.engine.wire.peer import PeerFailedError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PeerFailedError("it gave up", hint="ask there"), PeerError),
        (TruncatedError("cut short", record="END"), TransportError),
        (ConnectionResetError("gone"), TransportError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_source_that_has_spoken_or_is_gone_is_told_nothing(error, kind):
    raised, told = as_arrival_error(error, phase=Phase.PRECOPY)
    assert (type(raised), raised.phase, raised.guest_at) == (kind, "pre-copy", GuestAt.SOURCE)
    assert told is None


def test_a_source_that_stood_still_is_told_for_it_may_be_there():
    raised, told = as_arrival_error(TimeoutError("stalled"), phase=Phase.PRECOPY)
    assert (type(raised), raised.reason, raised.guest_at) == (TransportError, "the source stood still", GuestAt.SOURCE)
    assert told.reason == "the source stood still too long"


@pytest.mark.parametrize(
    ("error", "kind", "gfn"),
    [
        (RecordError("what is that", record="PAGES"), PeerError, None),
        (VerifyError("a page differs", gfn=7), PeerError, 7),
        (UsageError("no room", hint="make some"), MigrationError, None),
        (KvmError("KVM_RUN", errno.ENOMEM), MigrationError, None),  # an OSError too, and no fault of the connection
        (ValueError("a defect"), MigrationError, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_is_wrong_here_is_told_to_the_source_in_the_same_words(error, kind, gfn):
    raised, told = as_arrival_error(error, phase=Phase.PRECOPY)
    assert (type(raised), raised.phase, raised.guest_at) == (kind, "pre-copy", GuestAt.SOURCE)
    assert (told.reason, told.hint, told.gfn) == (raised.reason, raised.hint, gfn)


@pytest.mark.parametrize(
    ("error", "reason", "hint"),
    [
        (
            ConnectError(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")),
            "cannot connect to tcp://there:1: Connection refused",
            "nothing listens there",
        ),
        (
            ConnectError(socket.gaierror(socket.EAI_NONAME, "Name or service not known")),
            "cannot connect to tcp://there:1: Name or service not known",
            "the name is not known",
        ),
        (
            ConnectError(TimeoutError(errno.ETIMEDOUT, "Connection timed out")),
            "cannot connect to tcp://there:1: Connection timed out",
            "nothing answers there",
        ),
        (ConnectError(TimeoutError("stalled")), "cannot connect to tcp://there:1: stalled", ""),
        (
            ConnectError(OSError(errno.EMFILE, "Too many open files")),
            "the source is out of a resource: Too many",
            "ulimit -n",
        ),
        (TimeoutError("stalled"), "the connection to tcp://there:1 stood still for 30 s", ""),
        (StalledError(2.0312), "the connection to tcp://there:1 stood still for 2 s", ""),
        (ConnectionResetError(errno.ECONNRESET, "gone"), "the connection to tcp://there:1 was cut: gone", ""),
    ],
    ids=lambda value: f"{value!r}" if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("phase", [Phase.CONNECT, Phase.HELLO, Phase.HANDOFF, Phase.POSTCOPY])
def test_a_connection_that_was_not_made_is_not_one_that_was_cut(error, reason, hint, phase):
    raised = as_migration_error(error, phase=phase, guest_at=GuestAt.UNKNOWN, peer="tcp://there:1", timeout_s=30)
    assert (type(raised), raised.phase, raised.guest_at) == (TransportError, str(phase), GuestAt.UNKNOWN)
    assert raised.reason.startswith(reason)
    assert hint in raised.hint
    assert bool(hint) == bool(raised.hint)


def test_a_migration_error_stays_what_it_is():
    error = MigrationError("so it is", phase="state", guest_at=GuestAt.UNKNOWN, hint="look")
    raised, told = as_arrival_error(error, phase=Phase.VERIFY)
    assert raised is error
    assert (told.reason, told.hint) == ("so it is", "look")
