"""A guest's console as a person and a script use it: a terminal, a pipe, a migration, and peers that misbehave."""

import base64
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from at_work import until
from processes import GIVE_UP_S, cli, reap

from pageferry.stream.ferry_frames import FrameType
from pageferry.vmm.qmp_client import QmpClient
from pageferry.vmm.qmp_error import QmpError


@pytest.fixture
def start(start, process_accel):
    return lambda *arguments: start(*arguments, "--accel", process_accel)


@pytest.fixture
def echo(start):
    return lambda: start("run", "echo", "--memory", "16M")


@pytest.fixture
def attach(seat):
    return lambda guest, **options: seat("console", "--control", guest.control, **options)


@pytest.fixture
def echo_here(seat, process_accel):
    """`pageferry run` with the console at hand."""
    run = ("run", "echo", "--memory", "16M", "--console", "stdio", "--accel", process_accel)
    return lambda **options: seat(*run, **options)


def test_a_person_at_a_terminal(echo, attach):
    guest = echo()
    console = attach(guest)
    assert b"Ctrl-] detaches" in console.read_until(b"seed 1\r\n")  # output since the start, after how to leave
    assert console.settings() != console.before
    console.type(b"hi\x03 there\r")  # Ctrl-C is the guest's
    assert console.read_until(b"there\r\n") == b"1: hi\x03 there\r\n"  # the terminal itself echoes nothing
    console.type(b"lost\r\x1dnever sent")
    console.read_until(b"detached")
    assert console.wait() == 0
    assert console.settings() == console.before
    again = attach(guest)
    assert again.read_until(b"2: lost\r\n").count(b"1: hi") == 1


def test_a_signal_leaves_the_terminal_as_it_was(echo, attach):
    guest = echo()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        console = attach(guest)
        console.read_until(b"seed 1\r\n")
        assert console.settings() != console.before
        console.popen.send_signal(number)
        assert console.wait() == 130
        assert console.settings() == console.before


def test_a_guest_process_that_dies_leaves_the_terminal_as_it_was(echo, attach):
    guest = echo()
    console = attach(guest)
    console.read_until(b"seed 1\r\n")
    guest.end()
    console.read_until(b"went away")
    assert console.wait() == 6
    assert console.settings() == console.before


def test_a_terminal_that_is_hung_up_detaches(echo, attach):
    guest = echo()
    console = attach(guest)
    console.read_until(b"seed 1\r\n")
    os.close(console.master)
    os.close(console.slave)
    console.master = None
    assert console.wait() == 0
    assert guest.ask("query-status")["running"]


def test_a_pipe_is_typed_whole_however_long_and_output_goes_on_after_its_end(echo, attach):
    guest = echo()
    console = attach(guest, terminal=False)
    lines = [b"line %d \x1d\r" % number for number in range(800)]
    threading.Thread(target=lambda: (console.popen.stdin.write(b"".join(lines)), console.popen.stdin.close())).start()
    seen = console.read_until(b"800: line 799 \x1d\n")
    assert seen.count(b"\n") == 800 + 2  # each answer once; the guest's greeting and ours
    with QmpClient(guest.control) as client:
        client.execute("x-console-write", data=base64.b64encode(b"by another\r").decode())
    console.read_until(b"801: by another\n")
    guest.ask("quit")
    console.read_until(b"the guest process has ended")
    assert console.wait() == 0


def test_without_input_it_only_shows_output(echo, attach):
    guest = echo()
    console = attach(guest, terminal=False, stdin=subprocess.DEVNULL)
    assert b"Ctrl-C detaches" in console.read_until(b"seed 1\n")
    console.popen.send_signal(signal.SIGINT)
    console.read_until(b"pageferry: detached")
    assert console.wait() == 0


def test_with_its_standard_input_closed(echo):
    guest = echo()
    shell = f"exec {sys.executable} -m pageferry console --control {guest.control} <&- 2>&1"
    popen = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE)
    try:
        while b"seed 1" not in popen.stdout.readline():
            assert popen.poll() is None
        guest.ask("quit")
        assert b"the guest process has ended" in popen.stdout.read()
        assert popen.wait(GIVE_UP_S) == 0
    finally:
        reap(popen)


def test_two_may_look_and_both_may_type(echo, attach):
    guest = echo()
    first, second = attach(guest), attach(guest)
    for console in (first, second):
        console.read_until(b"seed 1\r\n")
    first.type(b"from one\r")
    second.read_until(b"1: from one\r\n")
    second.type(b"from two\r")
    assert first.read_until(b"2: from two\r\n") == b"1: from one\r\n2: from two\r\n"


def test_a_guest_that_never_reads_keeps_no_client_waiting(start, attach):
    guest = start("run", "kv", "--memory", "32M", "--working-set", "1M")
    console = attach(guest)
    console.read_until(b"seed 1\r\n")
    full = base64.b64encode(bytes(8192)).decode()
    while guest.ask("x-console-write", data=full)["taken"]:
        pass
    console.type(b"x" * 4096)
    console.type(b"y" * 10)
    console.read_until(b"\a")
    console.type(b"\x1d")
    assert b"4,096 bytes of input did not reach" in console.read_until(b"the guest\r\n")
    assert console.wait() == 0


def test_input_typed_before_and_after_a_migration_is_answered_once(echo, start, attach):
    source, destination = echo(), start("receive", "tcp://127.0.0.1:0")
    with pytest.raises(QmpError, match="no guest is here yet"):
        destination.ask("x-console-follow")
    console = attach(source)
    console.read_until(b"seed 1\r\n")
    console.type(b"one\r")
    console.read_until(b"1: one\r\n")
    source.ask("stop")
    typed = b"two\r" + b"three is longer than the receiver holds\rfo"
    assert source.ask("x-console-write", data=base64.b64encode(typed).decode()) == {"taken": len(typed)}
    source.ask("migrate", uri=destination.ask("x-query-guest")["listening"])
    console.read_until(b"the guest has left for tcp://")
    assert console.wait() == 0
    assert console.settings() == console.before
    refused = cli("console", "--control", source.control, stdin=subprocess.DEVNULL)
    assert refused.returncode == 2
    assert "the guest has left for tcp://" in refused.stderr
    there = attach(destination)
    there.read_until(b"attached")
    destination.ask("cont")
    there.type(b"ur\r")
    there.read_until(b"\r\n")
    assert there.read_until(b"4: four\r\n") == b"2: two\r\n3: three is longer than the receiver holds\r\n4: four\r\n"
    said = b"2: two\n3: three is longer than the receiver holds\n4: four\n"
    until(lambda: len(destination.output.read_bytes()) >= len(said), "output, which another thread writes")
    assert destination.output.read_bytes() == said
    assert source.output.read_bytes() == b"echo: 0 pages, rate 0/s, seed 1\n1: one\n"


def test_while_the_guest_is_frozen_input_waits_and_is_not_lost(echo, start, attach, wires):
    source, destination = echo(), start("receive", "tcp://127.0.0.1:0")
    console = attach(source, terminal=False)
    console.read_until(b"seed 1\n")
    wire = wires(destination.endpoint(), hold_at=int(FrameType.READY).to_bytes(4, "little"))
    source.ask("migrate", uri=wire.uri)
    assert wire.held.wait(GIVE_UP_S)
    data = base64.b64encode(b"too early\r").decode()
    assert source.ask("x-console-write", data=data) == {"taken": 0}
    console.type(b"patience\r")
    wire.cut()
    wire.release()
    assert console.read_until(b"\n") == b"1: patience\n"


BAD_INPUT = [
    ({}, "missing"),
    ({"data": 5}, "string"),
    ({"data": "?"}, "base64"),
    ({"data": "", "to": "x"}, "unexpected"),
]


def test_bad_input_is_refused_and_does_no_harm(echo, attach):
    guest = echo()
    for arguments, says in BAD_INPUT:
        with pytest.raises(QmpError, match=says):
            guest.ask("x-console-write", **arguments)
    with pytest.raises(QmpError, match="unexpected"):
        guest.ask("x-console-follow", from_the="start")
    with QmpClient(guest.control) as client:
        client.execute("x-console-follow")
        with pytest.raises(QmpError, match="follows something already"):
            client.execute("x-console-follow")
    console = attach(guest)
    console.read_until(b"seed 1\r\n")
    console.type(b"unharmed\r")
    console.read_until(b"1: unharmed\r\n")


def test_readers_that_leave_or_send_garbage_do_no_harm(echo, attach):
    guest = echo()
    for garbage in (b"", b"\xff\x00", b'{"execute":"x-console-write"}', b"{" * 100_000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(guest.control))
            sock.sendall(b'{"execute":"qmp_capabilities"}{"execute":"x-console-follow"}' + garbage)
    console = attach(guest)
    console.read_until(b"seed 1\r\n")
    console.type(b"still here\r")
    console.read_until(b"1: still here\r\n")


def test_a_guest_runs_at_a_terminal_until_that_is_given_back(echo_here):
    guest = echo_here()
    guest.read_until(b"Ctrl-] gives the terminal back")
    guest.read_until(b"seed 1\r\n")
    assert guest.settings() != guest.before
    guest.type(b"hi\x03 there\r")  # Ctrl-C is the guest's
    assert guest.read_until(b"there\r\n") == b"1: hi\x03 there\r\n"
    guest.type(b"last\r")
    guest.read_until(b"2: last\r\n")
    guest.type(b"\x1dnever sent\r")
    assert b"never" not in guest.read_until(b"detached; Ctrl-C ends the guest")
    assert guest.settings() == guest.before
    guest.popen.send_signal(signal.SIGINT)
    assert guest.wait() == 0


def test_a_guest_that_is_ended_leaves_its_terminal_as_it_was(echo_here):
    guest = echo_here()
    guest.read_until(b"seed 1\r\n")
    guest.popen.send_signal(signal.SIGTERM)
    assert guest.wait() == 0
    assert guest.settings() == guest.before


def test_a_guest_takes_all_of_a_pipe_and_runs_on_after_its_end(echo_here):
    guest = echo_here(terminal=False)
    guest.read_until(b"seed 1\n")
    lines = [b"line %d \x1d\r" % number for number in range(800)]
    guest.popen.stdin.write(b"".join(lines))
    guest.popen.stdin.close()
    seen = guest.read_until(b"800: line 799 \x1d\n")
    assert seen.count(b": line ") == 800
    assert guest.popen.poll() is None


def test_a_console_on_a_closed_standard_input_is_refused(process_accel):
    shell = f"exec {sys.executable} -m pageferry run echo --console stdio --accel {process_accel} <&-"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=GIVE_UP_S, check=False)
    assert done.returncode == 2
    assert b"--console stdio needs a standard input" in done.stderr
