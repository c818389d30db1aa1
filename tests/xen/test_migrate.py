"""A domain moves live through ``xl migrate-receive`` on this very host, or stays here whatever happens."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
from xen_guests import (
    MEMORY_BYTES,
    destroy,
    domid_of,
    log_dirty_is_off,
    low_memory,
    moving,
    pageferry,
    run_cancelled,
    run_killed,
    seen,
    wait_for_work,
    xl,
)

from pageferry.core.errors import GuestAt, MigrationError, UsageError
from pageferry.xen import uapi
from pageferry.xen.receiver import BANNER, GO, READY, REPORT
from pageferry.xen.undo_log import sweep

PHASES = ("hello", "pre-copy", "pause", "stop-and-copy", "state", "verify", "handoff")
GIVE_UP_S = 120.0
#: A receiver of our own: it reads the whole stream and goes as far as it is told. It imports little, to start fast.
_RECEIVER = """
import os, struct, sys

def read(size):
    got = b""
    while len(got) < size:
        more = os.read(0, min(size - len(got), 1 << 16))
        assert more
        got += more
    return got

def skip_records(last):
    kind = None
    while kind != last:
        kind, size = struct.unpack("<II", read(8))
        read(-(-size // 8) * 8)

os.write(1, {BANNER!r})
read(struct.unpack("<IIII", read(48)[32:])[3])
read(16)
skip_records(1)  # of libxl, to LIBXC_CONTEXT
read(40)
skip_records(0)
skip_records(0)
if {upto!r} != "end":
    os.write(1, {READY!r})
    assert read({go_bytes}) == {GO!r}
if {upto!r} == "refusal":
    os.write(1, {REPORT!r} + bytes([1]) + {GO!r})
sys.exit("out of luck")
"""


def receiver(upto):
    """Its command: it ends when it has read all, when it was given the domain (``ready``), or refuses it then."""
    words = {"BANNER": BANNER, "READY": READY, "GO": GO, "REPORT": REPORT, "go_bytes": len(GO)}
    return [sys.executable, "-S", "-c", _RECEIVER.format(upto=upto, **words)]


def expect_undone(control, store, domid):
    """The next start has undone what was left."""
    found = seen(control, store, domid)
    assert (found.log_dirty, found.status) == (False, "running")


def expect_left_alone(control, store, domain_name, domid):
    """A start leaves the domain suspended, and says why."""
    found = seen(control, store, domid)
    assert (found.name, found.status) == (f"{domain_name}--migratedaway", "suspended")
    assert "was given to another host by a process that had no answer" in found.by


def expect_at_work(control, store, domain_name, domid, memory):
    """The domain is here as if nothing had been."""
    assert store.read(f"/local/domain/{domid}/name") == domain_name
    info = control.info(domid)
    assert (info.paused, info.shutdown_reason) == (False, None)
    assert log_dirty_is_off(control, domid)
    wait_for_work(memory, 100)


def expect_no_copy_at_work(control, store, domid):
    """The receiver, whose source is gone, has destroyed its copy, or left it paused; it is destroyed here.

    Xen's receiver says what went wrong before it destroys its copy: without its source it cannot, and leaves it.
    """
    for other in set(store.directory("/local/domain")) - {"0", str(domid)}:
        assert (store.read(f"/local/domain/{other}/name") or "--incoming").endswith("--incoming")
        with contextlib.suppress(UsageError):  # it has ended
            assert control.info(int(other)).paused
        destroy(other)


def test_it_moves_and_goes_on_with_the_same_memory(control, store, domain_name, working):
    domid, _ = working
    domain, attempt = moving(control, store, domid)
    with contextlib.closing(domain):
        report = attempt.run()
    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    print(f"downtime {report.downtime_s:.3f} s {report.downtime_parts_s}, total {report.total_s:.1f} s")
    expect_moved(control, store, domain_name, domid)


def expect_moved(control, store, domain_name, domid):
    """The domain is suspended here for good, under another name, and at work there."""
    assert store.read(f"/local/domain/{domid}/name") == f"{domain_name}--migratedaway"
    assert control.info(domid).shutdown_reason == uapi.SHUTDOWN_suspend
    there = domid_of(domain_name)
    assert there != domid
    moved = low_memory(control, there, MEMORY_BYTES - (1 << 20))
    wait_for_work(moved, 100)
    assert not control.info(there).paused
    moved.close()


@pytest.mark.parametrize("phase", PHASES)
def test_a_failure_before_it_is_given_away_leaves_it_here(control, store, domain_name, working, phase):
    domid, memory = working
    failed = run_cancelled(phase, partial(moving, control, store, domid))
    assert failed.guest_at is GuestAt.SOURCE
    expect_at_work(control, store, domain_name, domid, memory)
    assert store.directory("/local/domain") == ["0", str(domid)]  # the receiver was heard to its end


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["xl", "no-such-command"], "xl ended, its last words"),
        (["sh", "-c", "echo out of luck >&2"], "sh ended, its last words: out of luck"),
        (["echo", "x" * 100], "echo answers what no xl migrate-receive does"),
        (
            ["sh", "-c", "echo xl migration receiver ready, send binary domain data.; head -c 2000000 >/dev/null"],
            "sh ended",
        ),
        (receiver("end"), "ended, its last words: out of luck"),
        (receiver("refusal"), "could not be started there, and its copy was destroyed"),
    ],
    ids=["no-receiver", "dies-at-once", "says-something-else", "dies-in-pre-copy", "dies-at-the-end", "refuses"],
)
def test_a_receiver_that_fails_leaves_the_domain_here(control, store, domain_name, working, command, why):
    domid, memory = working
    domain, attempt = moving(control, store, domid, command, rounds=1)
    with contextlib.closing(domain), pytest.raises(MigrationError, match=why) as failed:
        attempt.run()
    assert failed.value.guest_at is GuestAt.SOURCE
    expect_at_work(control, store, domain_name, domid, memory)


def test_a_receiver_that_dies_without_an_answer_leaves_the_choice_to_the_user(control, store, domain_name, working):
    domid, memory = working
    command = ("--through", shlex.join(receiver("ready")), "--policy", "xen")
    told = pageferry("migrate", f"xen:{domid}", *command, code=4)
    assert f"pageferry xen resume {domid}" in told
    expect_left_alone(control, store, domain_name, domid)
    assert f"pageferry xen resume {domid}" in pageferry("save", f"xen:{domid}", "file", code=2)
    pageferry("xen", "resume", domid)
    expect_at_work(control, store, domain_name, domid, memory)
    assert "was not given to another host" in pageferry("xen", "resume", domid, code=2)


@pytest.mark.parametrize("moment", ["connect", *PHASES, "first-round"])
def test_a_kill_before_it_is_given_away_is_undone_by_the_next_start(control, store, domain_name, working, moment):
    domid, memory = working
    run_killed(moment, domid)
    expect_undone(control, store, domid)
    expect_at_work(control, store, domain_name, domid, memory)
    expect_no_copy_at_work(control, store, domid)


def test_a_kill_between_giving_it_away_and_saying_so_leaves_the_choice_to_the_user(
    control, store, domain_name, working
):
    domid, memory = working
    run_killed("given-away", domid)
    for _ in range(2):
        expect_left_alone(control, store, domain_name, domid)
    expect_no_copy_at_work(control, store, domid)
    pageferry("xen", "resume", domid)
    expect_at_work(control, store, domain_name, domid, memory)


@pytest.mark.parametrize("moment", ["told", "gone", "end"])
def test_a_kill_after_that_leaves_it_there_alone(control, store, domain_name, working, moment):
    domid, _ = working
    run_killed(moment, domid)
    until = time.monotonic() + GIVE_UP_S
    while xl("domid", domain_name, check=False) == "":  # the receiver goes on without us
        assert time.monotonic() < until
        time.sleep(0.2)
    sweep(control)
    expect_moved(control, store, domain_name, domid)


def listens(port):
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def ssh_server(folder):
    """A real one on this host; its port, and the environment in which ``ssh`` finds its key."""
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/client.pub\n"
        "UsePAM no\nStrictModes no\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/client\nStrictHostKeyChecking no\nUserKnownHostsFile {folder}/known_hosts\n"
        "LogLevel ERROR\nBatchMode yes\n"
    )
    ssh = folder / "ssh"  # the configuration of this user is not to be changed
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    with subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config"]) as server:
        try:
            until = time.monotonic() + GIVE_UP_S
            while not listens(port):
                assert server.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            yield port, os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
        finally:
            server.terminate()


def test_it_moves_over_ssh(control, store, domain_name, working, tmp_path):
    domid, _ = working
    move = ("migrate", f"xen:{domid}", "--policy", "xen", "--json")
    with ssh_server(tmp_path) as (port, environment):
        moved = json.loads(pageferry(*move, f"ssh://root@localhost:{port}", env=environment))
    assert (moved["status"], moved["guest_at"]) == ("completed", "destination")
    expect_moved(control, store, domain_name, domid)


def test_where_no_ssh_server_listens_it_stays_here(control, store, domain_name, working):
    domid, memory = working
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    told = pageferry("migrate", f"xen:{domid}", f"ssh://root@localhost:{port}", code=3)
    assert "ssh ended, its last words" in told
    assert "Connection refused" in told
    expect_at_work(control, store, domain_name, domid, memory)
