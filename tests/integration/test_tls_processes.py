"""The command line over TLS: from nothing to a guest that has moved, and what is said where that cannot be."""

import re

import pytest
from processes import cli, one_line


@pytest.fixture
def lab(tmp_path):
    made = cli("keys", tmp_path / "lab", "--source", "alice", "--destination", "127.0.0.1")
    assert made.returncode == 0, made.stderr
    return tmp_path / "lab"


@pytest.fixture
def guest(start):
    return start("run", "kv", "--accel", "soft", "--memory", "32M", "--working-set", "1M", name="source")


def receive(start, *options, uri="tls://127.0.0.1:0"):
    return start("receive", uri, "--accel", "soft", *options, name="destination")


def migrate(guest, there, *options):
    uri = there.ask("x-query-guest")["listening"]
    return cli("migrate", "--control", guest.control, uri, *options)


def test_a_guest_moves_between_processes_with_keys_and_then_with_a_secret(start, lab, guest, tmp_path):
    there = receive(start, "--tls-dir", lab / "destination", "--peer", "alice")
    wrong = migrate(guest, there, "--tls-dir", lab / "source", "--peer", "bob")
    assert wrong.returncode == 3
    assert "the destination's certificate is for another name" in one_line(wrong)
    there.until(lambda: "does not accept our certificate" in there.log.read_text(), "the other end's word")
    moved = migrate(guest, there, "--tls-dir", lab / "source", "--connections", "2")
    assert moved.returncode == 0, moved.stderr
    assert "warning" not in moved.stderr
    assert there.runs_on()

    last = start("receive", "tls://127.0.0.1:0", "--accel", "soft", "--secret", "new", name="last")
    secret = re.search(r"^secret: (\S+)$", last.log.read_text(), re.MULTILINE)[1]
    file = tmp_path / "secret"
    file.write_text(secret)
    file.chmod(0o600)
    moved = migrate(there, last, "--secret-file", file)
    assert moved.returncode == 0, moved.stderr
    assert last.runs_on()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["tls://127.0.0.1:0"], "needs certificates, or a secret"),
        (["tls://127.0.0.1:0", "--tls-dir", "{lab}/destination"], "says whom it accepts"),
        (["tls://127.0.0.1:0", "--tls-dir", "{lab}/source", "--peer", "alice"], "there is no .*server-cert.pem"),
        (["tcp://127.0.0.1:0", "--secret", "new"], "is not encrypted"),
        (["tls://127.0.0.1:0", "--secret", "old"], "takes the word new"),
        (["tcp://127.0.0.1:0", "--peer", "alice"], "--peer goes with --tls-dir|without certificates"),
    ],
    ids=["nothing", "no peer", "the other end's", "plain", "old", "names"],
)
def test_a_destination_that_cannot_be_is_refused_at_once(lab, options, says, tmp_path):
    options = [each.format(lab=lab) for each in options]
    refused = cli("receive", *options, "--accel", "soft", "--control", tmp_path / "x.sock")
    assert refused.returncode == 2
    assert re.search(says, one_line(refused))
    assert not (tmp_path / "x.sock").exists()


def test_a_plain_address_that_others_reach_warns_unless_it_is_meant(guest):
    nowhere = "tcp://0.0.0.0:1"
    for options, warns in (([], True), (["--insecure"], False)):
        result = cli("migrate", "--control", guest.control, nowhere, "--timeout", "0.1", *options)
        assert result.returncode == 3
        assert ("warning: at tcp://0.0.0.0:1 others on the network can read" in result.stderr) == warns
    result = cli("migrate", "--control", guest.control, "tcp://127.0.0.1:1")
    assert "warning" not in result.stderr
