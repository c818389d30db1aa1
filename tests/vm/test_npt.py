"""The parts of ``make test-npt`` that need no emulator."""

import os
import signal
import subprocess
import sys

import npt
import pytest


@pytest.mark.parametrize("tool", npt.TOOLS)
def test_what_is_missing_is_said_with_the_command_that_installs_it(tool, tmp_path, monkeypatch, capsys):
    for other in npt.TOOLS.keys() - {tool}:
        (tmp_path / other).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert npt.main([]) == npt.NOT_RUN
    assert f"sudo apt-get install {npt.TOOLS[tool]}" in capsys.readouterr().out


def python(script):
    """The command of an emulator that does this."""
    return [sys.executable, "-c", script]


@pytest.mark.parametrize("code", [0, 1, 5])
def test_the_exit_code_of_the_tests_comes_back(tmp_path, code):
    assert npt.run_machine(python(f"raise SystemExit({(0x40 + code) * 2 + 1})"), tmp_path, 0) == code


@pytest.mark.parametrize("status", [0, 1])
def test_a_machine_without_a_result_is_a_failure_and_shows_its_kernel_log(tmp_path, capsys, status):
    npt.kernel_log(tmp_path, 0).write_text("panic: of the kernel\n")
    assert npt.run_machine(python(f"raise SystemExit({status})"), tmp_path, 0) == npt.NOT_RUN
    assert "panic: of the kernel" in capsys.readouterr().out


def test_a_machine_that_never_ends_is_given_up_and_killed(tmp_path):
    script = "import threading; threading.Event().wait()"
    assert npt.run_machine(python(script), tmp_path, 0, give_up_s=0) == npt.NOT_RUN
    assert npt._machines[-1].returncode == -signal.SIGKILL


def test_the_first_process_is_a_shell_script_that_runs_the_tests_asked_for(tmp_path):
    script = npt.init_script([npt.Part(("tests/kvm", "-k", "one and 'two'")), npt.Part(("tests/other",))])
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    line = next(line for line in script.splitlines() if line.startswith("chroot"))
    arguments = subprocess.run(
        ["sh", "-c", f"chroot() {{ printf '%s' \"$4\"; }}; {line.partition(' >')[0]}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-k 'one and '\"'\"'two'\"'\"''" in arguments.stdout
    assert "*part=1*) exec" in arguments.stdout


def test_each_machine_does_its_part_and_the_worst_exit_code_counts(tmp_path, capfd):
    commands = [python(f"print('part', {part}); raise SystemExit({(0x40 + part) * 2 + 1})") for part in range(2)]
    assert npt.run_machines(commands, tmp_path) == 1
    said = capfd.readouterr().out
    assert "part 0" in said
    assert "part 1" in said
    assert "exit code 1 after" in said


def test_a_run_that_is_interrupted_begins_no_other_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(npt.os, "sched_getaffinity", lambda _: {0})
    endless = python(f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        npt.run_machines([endless, python(f"open({str(tmp_path / 'begun')!r}, 'w')")], tmp_path)
    assert npt._machines[-1].returncode == -signal.SIGKILL
    assert not (tmp_path / "begun").exists()
