"""The receiver's protocol: words that come, do not come, or are others; and how it is reached."""

import signal
import sys
import threading

import pytest

from pageferry.core.errors import UsageError
from pageferry.xen.receiver import BANNER, GO, READY, Receiver, ReceiverError, ssh_command, through_command


@pytest.fixture
def receiver():
    made = []

    def start(script, timeout_s=30.0):
        made.append(Receiver([sys.executable, "-c", f"import os, sys, time\n{script}"], timeout_s))
        return made[-1]

    yield start
    for each in made:
        each.see_off(0.0)


def test_what_is_sent_arrives_and_what_is_said_is_heard(receiver):
    size = 3 << 20
    there = receiver(
        f"os.write(1, {BANNER!r}); got = sys.stdin.buffer.read({size}); os.write(1, {READY!r})\n"
        f"assert got == bytes(range(256)) * ({size} // 256); os.write(1, sys.stdin.buffer.read({len(GO)}))"
    )
    there.expect(BANNER)
    there.send([b"", bytes(range(256)) * (size // 512), memoryview(bytes(range(256)) * (size // 512))])
    there.expect(READY)
    there.send([GO])
    there.expect(GO)
    assert there.sent_bytes == size + len(GO)


def test_one_that_ends_is_told_with_its_last_words(receiver):
    there = receiver("sys.stderr.write('first\\nno such host\\n'); sys.exit(1)")
    with pytest.raises(ReceiverError, match=r"ended, its last words: no such host$"):
        there.expect(BANNER)


def test_one_that_ends_while_it_is_sent_to_is_told(receiver):
    there = receiver("sys.stderr.write('out of memory\\n')")
    there._process.wait()
    with pytest.raises(ReceiverError, match=r"ended, its last words: out of memory$"):
        there.send([b"x"])


def test_one_that_says_something_else_is_no_receiver(receiver):
    there = receiver("os.write(1, b'Welcome to the machine' * 9); time.sleep(60)")
    with pytest.raises(ReceiverError, match=r"answers what no xl migrate-receive does: b'Welcome"):
        there.expect(BANNER)


@pytest.mark.parametrize("call", [lambda there: there.expect(BANNER), lambda there: there.send([bytes(9 << 20)])])
def test_one_that_stands_still_is_given_up(receiver, call):
    there = receiver("time.sleep(60)", timeout_s=0.05)
    with pytest.raises(ReceiverError, match=r"said or took nothing for 0.05 s"):
        call(there)


@pytest.mark.parametrize("call", [lambda there: there.expect(BANNER), lambda there: there.send([bytes(9 << 20)])])
def test_one_that_is_given_up_wakes_who_waits_for_it(receiver, call):
    there = receiver("time.sleep(60)")
    waker = threading.Timer(0.05, there.abort)
    waker.start()
    with pytest.raises(ReceiverError, match="was not waited for any longer"):
        call(there)
    waker.join()


def test_one_that_was_not_given_the_domain_has_time_to_destroy_its_copy(receiver, tmp_path):
    there = receiver(
        f"os.write(1, {BANNER!r}); sys.stdin.buffer.read()\n"
        f"os.write(1, bytes(3 << 20)); open({str(tmp_path / 'destroyed')!r}, 'w')"  # more than a pipe holds
    )
    there.expect(BANNER)
    there.send([b"some of it"])
    there.abort()
    there.close()
    there.see_off()
    there.see_off()
    there.abort()
    assert (tmp_path / "destroyed").exists()


def test_one_that_does_not_end_is_killed(receiver):
    there = receiver(f"os.write(1, {BANNER!r}); time.sleep(60)")
    there.expect(BANNER)
    there.see_off(0.05)
    assert there._process.returncode == -signal.SIGKILL


def test_a_program_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="cannot run no-such-program: No such file"):
        Receiver(["no-such-program"], 1.0)


def test_an_address_becomes_a_command():
    assert ssh_command("ssh://host") == ["ssh", "--", "host", "xl", "migrate-receive"]
    assert ssh_command("ssh://root@host:2222") == ["ssh", "-p", "2222", "--", "root@host", "xl", "migrate-receive"]
    assert through_command("ssh -J a 'b c' xl migrate-receive") == ["ssh", "-J", "a", "b c", "xl", "migrate-receive"]


@pytest.mark.parametrize("uri", ["tcp://host:1", "ssh://", "ssh://-oProxyCommand=x", "ssh://a/b", "host"])
def test_what_is_no_address_is_refused(uri):
    with pytest.raises(UsageError, match="is no address of another dom0"):
        ssh_command(uri)


@pytest.mark.parametrize("command", ["", "  ", "'"])
def test_what_is_no_command_is_refused(command):
    with pytest.raises(UsageError, match="--through"):
        through_command(command)
