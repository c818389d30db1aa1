"""Who may talk: both ends of a migration verify each other, on every connection, and each refusal is told at both."""

import contextlib
import socket
import ssl
import threading

import numpy as np
import pytest
from altered import AlteredDestination
from at_work import runs_on, until
from certified import NOW, YEAR, authority, tls_dir
from proxy import Recorder
from trips import TIMEOUT_S, Rounds, source_of

from pageferry.core.errors import GuestAt, MigrationError, UsageError
from pageferry.core.policy import Action, Decision
from pageferry.engine.destination import Destination
from pageferry.engine.job import JobStatus
from pageferry.engine.options import WireOptions
from pageferry.engine.postcopy.pager import DemandPager
from pageferry.engine.wire.acceptor import Acceptor
from pageferry.engine.wire.channel import Endpoint
from pageferry.engine.wire.connections import join
from pageferry.engine.wire.credentials import Credentials, new_secret
from pageferry.engine.wire.peer import PeerRefusedError
from pageferry.engine.wire.tls_errors import TlsError
from pageferry.stream.ferry_order import Side

#: To TLS the machines do not differ.
pytestmark = pytest.mark.parametrize("accel", ["soft"], indirect=True)

SOURCE, DESTINATION = "alice.example", "127.0.0.1"
#: What the guest has in its memory, and no other may see.
CONTENT = b"the content of this very guest, " * 128


class House:
    """An acceptor with a destination behind it, on a thread; ``refused`` is what was told of who was turned away."""

    def __init__(self, make_vm, credentials, uri, kind):
        self.make_vm = make_vm
        self.kind = kind
        self.refused = []
        self.acceptor = Acceptor(uri, TIMEOUT_S, credentials=credentials, on_refused=self.refused.append)
        self.endpoint = self.acceptor.endpoint
        self.vms = []
        self.errors = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        with contextlib.suppress(ConnectionAbortedError):
            while True:
                peer = self.acceptor.wait()
                try:
                    destination = self.kind(
                        peer, self.make_vm, accept=self.acceptor.accept, never_ran=self.acceptor.never_ran
                    )
                    self.vms.append(destination.run())
                except MigrationError as error:
                    self.errors.append(error)

    def arrived(self):
        return until(lambda: self.vms, lambda: f"guest: {self.errors} {self.refused}")[-1]

    def close(self):
        self.acceptor.close()
        self._thread.join()
        for vm in self.vms:
            vm.close()


@pytest.fixture
def house(make_vm):
    """Opens houses with certificates in a directory, or whatever credentials there are."""
    made = []

    def open_(credentials, uri="tls://127.0.0.1:0", kind=Destination):
        made.append(House(make_vm, credentials, uri, kind))
        return made[-1]

    yield open_
    for each in made:
        each.close()


@pytest.fixture(params=["certificates", "secret"])
def ends(request, tmp_path):
    """The credentials of the source and of the destination."""
    if request.param == "secret":
        secret = new_secret()
        return Credentials.from_secret(secret, Side.SOURCE), Credentials.from_secret(secret, Side.DESTINATION)
    ca = authority()
    return (
        Credentials.from_dir(tls_dir(tmp_path / "a", Side.SOURCE, ca, SOURCE), Side.SOURCE, None),
        Credentials.from_dir(tls_dir(tmp_path / "b", Side.DESTINATION, ca, DESTINATION), Side.DESTINATION, SOURCE),
    )


def over_tls(endpoint):
    """The same place, spoken to by TLS."""
    return Endpoint(host=endpoint.host, port=endpoint.port, tls=True)


def test_a_guest_moves_over_two_connections_that_others_cannot_read(running, house, ends):
    ours, theirs = ends
    there = house(theirs)
    vm = running()
    vm.memory.write(24 << 20, CONTENT)
    recorder = Recorder(there.endpoint)
    try:
        report = source_of(
            vm, over_tls(recorder.endpoint), name="secretive", credentials=ours, wire=WireOptions(connections=2)
        ).run()
        arrived = there.arrived()
    finally:
        recorder.close()
    assert (report.status, report.verified) == ("completed", True)
    assert arrived.memory.read(24 << 20, len(CONTENT)) == CONTENT
    assert runs_on(arrived)
    assert len(recorder.tapes) == 2
    assert all(tape[:2] == b"\x16\x03" for tape in recorder.tapes)
    assert not any(CONTENT[:32] in tape or b"secretive" in tape or b"PGFERRY" in tape for tape in recorder.tapes)
    assert there.refused == there.errors == []


class Switch:
    """Post-copy after one round, with pages missing."""

    name = "switch"
    switches = True

    def __init__(self, vm):
        self.vm = vm

    def decide(self, progress):
        self.vm.memory.write(24 << 20, CONTENT * 256)
        return Decision(action=Action.POST_COPY, reason="so")


def test_post_copy_comes_back_over_tls_and_over_nothing_else(running, house, ends):
    ours, theirs = ends
    may_ask = threading.Event()

    class Reserved(DemandPager):
        """Asks for what is touched, and for the rest when it may."""

        def ahead(self, at_most):
            return super().ahead(at_most) if may_ask.is_set() else np.empty(0, np.uint64)

    there = house(theirs, kind=AlteredDestination.having({"postcopy.client.DemandPager": Reserved}))
    vm = running()
    recorder = Recorder(there.endpoint)
    source = source_of(vm, over_tls(recorder.endpoint), Switch(vm), credentials=ours)
    failed = []

    def run():
        try:
            source.run()
        except MigrationError as error:
            failed.append(error)

    moving = threading.Thread(target=run)
    moving.start()
    try:
        until(lambda: source.job.status == JobStatus.POSTCOPY_ACTIVE or failed, "switch")
        recorder.cut()
        until(lambda: source.job.postcopy_paused or failed, "cut")
        assert source.job.recover(Endpoint(host="127.0.0.1", port=there.endpoint.port))
        until(lambda: "not encrypted" in (source.job.postcopy_paused or ""), "refusal")
        assert source.job.recover(there.endpoint)
        may_ask.set()
    finally:
        may_ask.set()
        moving.join()
        recorder.close()
    assert failed == []
    assert source.job.report.status == "completed"
    assert there.arrived().memory.read(24 << 20, len(CONTENT)) == CONTENT
    assert runs_on(there.arrived())


# -- who is turned away ------------------------------------------------------------------------------------------------


def differing(tmp_path, **what):
    """Credentials of both ends, of which something is not as it should be."""
    ca, other = authority(), authority("another CA")
    kinds = {"ca": ca, "other": other, "old": authority(now=NOW - YEAR), "new": authority(now=NOW + YEAR)}
    ours, theirs = what.get("ours", {}), what.get("theirs", {})
    source = tls_dir(
        tmp_path / "a",
        Side.SOURCE,
        kinds[ours.get("by", "ca")],
        *ours.get("names", (SOURCE,)),
        trusted=kinds[what.get("trusted_here", theirs.get("by", "ca"))],
        server=ours.get("server"),
    )
    destination = tls_dir(
        tmp_path / "b",
        Side.DESTINATION,
        kinds[theirs.get("by", "ca")],
        *theirs.get("names", (DESTINATION,)),
        trusted=kinds[what.get("trusted_there", ours.get("by", "ca"))],
        server=theirs.get("server"),
    )
    return (
        Credentials.from_dir(source, Side.SOURCE, what.get("expected_there")),
        Credentials.from_dir(destination, Side.DESTINATION, what.get("expected_here", SOURCE)),
    )


REFUSALS = {
    "the source is of another CA": (
        {"ours": {"by": "other"}, "trusted_there": "ca"},
        "the destination does not accept our certificate: it is of another CA than theirs",
        "the source's certificate is of another CA than ours",
    ),
    "the destination is of another CA": (
        {"theirs": {"by": "other"}, "trusted_here": "ca"},
        "the destination's certificate is of another CA than ours",
        "the source does not accept our certificate: it is of another CA than theirs",
    ),
    "the source has expired": (
        {"ours": {"by": "old"}},
        "the destination does not accept our certificate: it has expired",
        "the source's certificate has expired",
    ),
    "the destination has expired": (
        {"theirs": {"by": "old"}},
        "the destination's certificate has expired",
        "the source does not accept our certificate: it has expired",
    ),
    "the destination is not valid yet": (
        {"theirs": {"by": "new"}},
        "the destination's certificate is not valid yet",
        "the source does not accept our certificate",
    ),
    "the source has another name": (
        {"ours": {"names": ("mallory.example", "10.0.0.9")}},
        "the source's certificate is for mallory.example, 10.0.0.9, and not for alice.example",
        "the source's certificate is for mallory.example, 10.0.0.9, and not for alice.example",
    ),
    "the destination's certificate lacks the address": (
        {"theirs": {"names": ("bob.example",)}},
        "the destination's certificate is for another address",
        "the source does not accept our certificate: it is for another name, or not valid",
    ),
    "the destination has another name": (
        {"expected_there": "bob.example"},
        "the destination's certificate is for another name",
        "the source does not accept our certificate: it is for another name, or not valid",
    ),
    "the source shows a certificate for servers": (
        {"ours": {"server": True}},
        "the destination does not accept our certificate",
        "the source's certificate is not for this end of a connection",
    ),
    "the destination shows a certificate for clients": (
        {"theirs": {"server": False}},
        "the destination's certificate is not for this end of a connection",
        "the source does not accept our certificate",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_each_refusal_is_told_at_both_ends_and_leaves_the_guest(guests, house, tmp_path, what):
    differences, here_says, there_says = REFUSALS[what]
    ours, theirs = differing(tmp_path, **differences)
    there = house(theirs)
    vm = guests()
    source = source_of(vm, there.endpoint, credentials=ours)
    with pytest.raises(MigrationError) as failed:
        source.run()
    assert here_says in str(failed.value)
    assert failed.value.hint
    assert failed.value.guest_at is GuestAt.SOURCE
    until(lambda: there.refused, "refusal")
    assert len(there.refused) == 1
    assert "127.0.0.1 port " in there.refused[0]
    assert there_says in there.refused[0]
    assert there.vms == there.errors == []


def test_a_plain_source_is_told_to_use_tls(guests, house, ends):
    there = house(ends[1])
    plain = Endpoint(host="127.0.0.1", port=there.endpoint.port)
    with pytest.raises(MigrationError, match="this destination speaks TLS only") as failed:
        source_of(guests(), plain).run()
    assert failed.value.hint == "pageferry migrate to tls://, with --tls-dir or --secret-file"
    until(lambda: there.refused, "refusal")
    assert "it does not speak TLS" in there.refused[0]


def test_a_source_with_tls_is_told_that_the_destination_is_plain(guests, house, ends):
    there = house(None, "tcp://127.0.0.1:0")
    with pytest.raises(MigrationError, match="the destination does not speak TLS") as failed:
        source_of(guests(), over_tls(there.endpoint), credentials=ends[0]).run()
    assert "receive tls://" in failed.value.hint
    until(lambda: there.refused, "refusal")
    assert "it looks like a TLS client" in there.refused[0]


def test_who_shows_no_certificate_is_turned_away(house, ends):
    there = house(ends[1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    channel = there.endpoint.connect(TIMEOUT_S)
    channel.secure(context, server_name="127.0.0.1")
    with pytest.raises(TlsError, match="does not accept our certificate: there was none"):
        join(channel, "token", 1)
    channel.close()
    until(lambda: there.refused, "refusal")
    assert "the source has no certificate" in there.refused[0]


def test_an_older_tls_is_not_spoken(house, ends):
    there = house(ends[1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    channel = there.endpoint.connect(TIMEOUT_S)
    with pytest.raises(TlsError, match=r"does not speak TLS 1\.3"):
        channel.secure(context, server_name="127.0.0.1")
    channel.close()
    until(lambda: there.refused, "refusal")
    assert "the source does not speak TLS 1.3" in there.refused[0]


def test_another_secret_opens_nothing(house):
    there = house(Credentials.from_secret(new_secret(), Side.DESTINATION))
    other = Credentials.from_secret(new_secret(), Side.SOURCE)
    channel = there.endpoint.connect(TIMEOUT_S)
    with pytest.raises(TlsError, match="the secrets differ: the destination does not have ours") as failed:
        channel.secure(other.context, server_name=other.peer)
    assert "receive --secret new" in failed.value.hint
    channel.close()
    until(lambda: there.refused, "refusal")
    assert "the secrets differ: the source does not have ours" in there.refused[0]


def test_a_certificate_of_the_same_ca_is_not_enough_to_join(running, house, ends):
    """Any holder of a certificate of the CA can knock; only one who has the migration's token gets in."""
    ours, theirs = ends
    there = house(theirs)
    knocked = []

    def knock(index):
        if index == 1:
            channel = there.endpoint.connect(TIMEOUT_S)
            channel.secure(ours.context, server_name=ours.peer or DESTINATION)
            with pytest.raises(PeerRefusedError, match="another guest is being received"):
                join(channel, "guess", 1)
            channel.close()
            knocked.append(index)

    class Way:
        opened = 0

        def __getattr__(self, name):
            return getattr(there.endpoint, name)

        def __str__(self):
            return str(there.endpoint)

        def connect(self, *args, **options):
            knock(self.opened)
            self.opened += 1
            return there.endpoint.connect(*args, **options)

    report = source_of(running(), Way(), credentials=ours, wire=WireOptions(connections=2)).run()
    assert (report.status, knocked) == ("completed", [1])


@pytest.mark.parametrize("tls", [True, False])
def test_tls_and_credentials_go_together(guests, ends, tls):
    endpoint = Endpoint(host="127.0.0.1", port=1, tls=tls)
    with pytest.raises((MigrationError, UsageError), match="needs certificates" if tls else "is not encrypted"):
        source_of(guests(), endpoint, credentials=None if tls else ends[0]).run()
    with pytest.raises(UsageError, match="needs certificates" if tls else "is not encrypted"):
        Acceptor(endpoint, credentials=None if tls else ends[1])


def test_a_cancel_wakes_a_source_whose_destination_does_not_answer_the_handshake(guests, ends):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = Endpoint(host="127.0.0.1", port=silent.getsockname()[1], tls=True)
        source = source_of(guests(), endpoint, Rounds(1), credentials=ends[0])
        failed = []

        def run():
            try:
                source.run()
            except MigrationError as error:
                failed.append(error)

        moving = threading.Thread(target=run)
        moving.start()
        sock, _ = silent.accept()
        assert sock.recv(1) == b"\x16"
        assert source.job.cancel()
        moving.join(TIMEOUT_S / 2)
        assert not moving.is_alive()
        assert failed[0].reason == "cancelled"
        sock.close()
