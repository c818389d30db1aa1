"""What a destination raises when something goes wrong, and what it tells the source first."""

import errno

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
from pageferry.engine.failures import as_arrival_error
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


def test_a_migration_error_stays_what_it_is():
    error = MigrationError("so it is", phase="state", guest_at=GuestAt.UNKNOWN, hint="look")
    raised, told = as_arrival_error(error, phase=Phase.VERIFY)
    assert raised is error
    assert (told.reason, told.hint) == ("so it is", "look")
