"""The parts of ``make test-npt`` that need no emulator."""

import shutil
import subprocess
import sys

import npt
import pytest

from pageferry.guests.linux.debian import LinuxImage


@pytest.mark.parametrize("tool", npt.TOOLS)
def test_what_is_missing_is_said_with_the_command_that_installs_it(tool, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    assert npt.main([]) == npt.NOT_RUN
    assert f"sudo apt-get install {npt.TOOLS[tool]}" in capsys.readouterr().out


def emulator(tmp_path, monkeypatch, *, script):
    (tmp_path / "kernel0.log").write_text("panic: of the kernel\n")
    monkeypatch.setattr(npt, "CACHE", tmp_path)
    monkeypatch.setattr(npt, "qemu_command", lambda *_: [sys.executable, "-c", script])


@pytest.mark.parametrize("code", [0, 1, 5])
def test_the_exit_code_of_the_tests_comes_back(tmp_path, monkeypatch, code):
    emulator(tmp_path, monkeypatch, script=f"raise SystemExit({(0x40 + code) * 2 + 1})")
    assert npt.run_machine(LinuxImage.of(tmp_path), 0) == code


@pytest.mark.parametrize("status", [0, 1])
def test_a_machine_without_a_result_is_a_failure_and_shows_its_kernel_log(tmp_path, monkeypatch, capsys, status):
    emulator(tmp_path, monkeypatch, script=f"raise SystemExit({status})")
    assert npt.run_machine(LinuxImage.of(tmp_path), 0) == npt.NOT_RUN
    assert "panic: of the kernel" in capsys.readouterr().out


def test_a_machine_that_never_ends_is_given_up_and_killed(tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen

    def start(*arguments, **options):
        started.append(real(*arguments, **options))
        return started[-1]

    emulator(tmp_path, monkeypatch, script="import threading; threading.Event().wait()")
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(npt, "GIVE_UP_S", 0)
    assert npt.run_machine(LinuxImage.of(tmp_path), 0) == npt.NOT_RUN
    assert started[0].returncode == -9


def test_the_first_process_is_a_shell_script_that_runs_the_tests_asked_for(tmp_path):
    script = npt.init_script([["tests/kvm", "-k", "one and 'two'"], ["tests/other"]])
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


def test_each_machine_does_its_part_and_the_worst_exit_code_counts(tmp_path, monkeypatch, capfd):
    (tmp_path / "kernel0.log").write_text("")

    def command(image, log, part):
        return [sys.executable, "-c", f"print('part', {part}); raise SystemExit({(0x40 + part) * 2 + 1})"]

    monkeypatch.setattr(npt, "CACHE", tmp_path)
    monkeypatch.setattr(npt, "qemu_command", command)
    monkeypatch.setattr(npt, "build_image", lambda *_, **__: LinuxImage.of(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert npt.main([]) == 1
    said = capfd.readouterr().out
    assert "part 0" in said
    assert "part 1" in said
    assert "exit code 1 after" in said
