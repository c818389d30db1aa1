"""What a host or process has run out of is told as such, at both ends, with what to do about it."""

import os
import resource
import subprocess

import pytest
from at_work import until
from processes import GIVE_UP_S, PAGEFERRY, cli, one_line

from pageferry.vmm.qmp_client import QmpClient

GUEST = ("kv", "--memory", "16M", "--working-set", "1M", "--rate", "5000", "--accel", "soft")


def open_files(process):
    return sorted(map(int, os.listdir(f"/proc/{process.popen.pid}/fd")))


def threads(process):
    return sorted(map(int, os.listdir(f"/proc/{process.popen.pid}/task")))


def at_rest(process, what):
    """What a process has when it has the same for a while."""
    seen = []

    def stand_still():
        seen.append(what(process))
        return len(seen) > 30 and all(each == seen[-1] for each in seen[-30:])

    process.until(stand_still, "rest")
    return seen[-1]


def allow_files(process, more):
    """Let a process open so many files more than it has, when it opens and closes none; return the limit before."""
    opened = at_rest(process, open_files)
    free = [fd for fd in range(max(opened) + more + 2) if fd not in opened]
    return limit_files(process, free[more])


def limit_files(process, limit):
    before, hard = resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (limit, hard))
    return before


def test_a_destination_that_may_open_no_more_files_says_so_and_waits_on(start):
    source, destination = start("run", *GUEST), start("receive", "tcp://127.0.0.1:0", "--accel", "soft")
    assert source.runs_on()
    uri = str(destination.endpoint())
    before = allow_files(destination, 1)  # the connection
    refused = cli("migrate", "--control", source.control, uri, "--downtime-limit", "60000")
    assert refused.returncode == 3, refused.stderr
    assert "Too many open files" in one_line(refused)
    assert "hint: " in refused.stderr
    assert "ulimit -n" in refused.stderr
    until(lambda: "Too many open files" in destination.log.read_text(), "word there")
    assert source.runs_on()
    limit_files(destination, before)
    moved = cli("migrate", "--control", source.control, uri, "--downtime-limit", "60000")
    assert moved.returncode == 0, moved.stderr


@pytest.mark.exhaustive("the other end says it in the same words")
def test_a_source_that_may_open_no_more_files_says_so(start):
    source, destination = start("run", *GUEST), start("receive", "tcp://127.0.0.1:0", "--accel", "soft")
    assert source.runs_on()
    assert cli("migrate", "--control", source.control, "tcp://127.0.0.1:1").returncode == 3  # now all is imported
    with QmpClient(source.control) as client:
        before = allow_files(source, 0)
        client.execute("migrate", uri=str(destination.endpoint()))
        info = until(lambda: (i := client.execute("query-migrate")).get("x-pageferry-error") and i, "end of it", 0.01)
        assert info["status"] == "failed"
        assert "the source is out of a resource: Too many open files" in info["error-desc"]
        assert info["x-pageferry-error"]["hint"] == (
            "at the source: this process may open no more files: raise ulimit -n"
        )
    limit_files(source, before)
    assert source.runs_on()


@pytest.fixture
def others_user(tmp_path):
    """How to run a command as a user who has no other processes: the kernel counts threads for each user."""
    if os.getuid() != 0:
        pytest.skip("needs root, to run as another user")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:-2]:
        folder.chmod(0o711)
    user = ("setpriv", f"--reuid={40_000 + os.getpid() % 20_000}", "--clear-groups")
    if subprocess.run([*user, *PAGEFERRY, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("another user cannot read this checkout")
    return user


def allow_threads(user, processes, more):
    """Let processes of a user have so many threads more than they have in all."""
    limit = more + sum(len(at_rest(process, threads)) for process in processes)
    for process in processes:
        command = [*user, "prlimit", f"--pid={process.popen.pid}", f"--nproc={limit}:"]
        subprocess.run(command, check=True, timeout=GIVE_UP_S)


@pytest.mark.exhaustive("the same is seen of each thread without a process, by one whose stack is too large")
def test_two_processes_that_may_have_no_more_threads_say_so_and_work_on(start, others_user):
    source = start("run", *GUEST, within=others_user)
    destination = start("receive", "tcp://127.0.0.1:0", "--accel", "soft", within=others_user)
    assert source.runs_on()
    migrate = ("migrate", "--control", source.control, destination.endpoint(), "--downtime-limit", "60000")
    both = (source, destination)

    allow_threads(others_user, both, 0)
    refused = cli(*migrate)
    assert refused.returncode == 6
    assert "turned the connection away: no more threads can be started" in one_line(refused)

    allow_threads(others_user, both, 2)  # of its client
    refused = cli(*migrate)
    assert refused.returncode == 6
    assert one_line(refused) == "pageferry: no more threads can be started"

    allow_threads(others_user, both, 3)  # and of the migration, at the source
    failed = cli(*migrate)
    assert failed.returncode == 3
    assert "the destination is out of a resource: no more threads can be started" in one_line(failed)
    assert "hint: at the destination: this user may have no more processes, threads" in failed.stderr

    allow_threads(others_user, both, 100)
    assert source.runs_on()
    moved = cli(*migrate)
    assert moved.returncode == 0, moved.stderr
    assert destination.runs_on()


@pytest.mark.parametrize("command", [("run", "idle", "--accel", "soft"), ("receive", "tcp://127.0.0.1:0")])
def test_a_socket_s_path_that_is_too_long_is_said_to_be(here, tmp_path, command):
    control = tmp_path / ("x" * 120)
    refused = here(*command, "--control", control)
    assert refused.returncode == 2
    assert "hint: the path of a socket has at most 107 bytes" in refused.stderr
    asked = here("status", "--control", control)
    assert asked.returncode == 6
    assert "hint: the path of a socket has at most 107 bytes" in asked.stderr


def test_a_receiver_s_socket_and_a_save_are_told_what_is_wrong_with_their_folders(here, start, tmp_path):
    refused = here("receive", f"unix:{tmp_path}/none/x", "--control", tmp_path / "c", "--accel", "soft")
    assert refused.returncode == 2
    assert "hint: no such file or folder" in refused.stderr
    source = start("run", "idle", "--memory", "8M", "--accel", "soft")
    saved = cli("save", tmp_path / "none" / "x", "--control", source.control)
    assert saved.returncode == 3
    assert "no such file or folder" in saved.stderr
    assert "where there is room" not in saved.stderr
