"""The parts of ``make test-xen`` that need no emulator."""

import subprocess
from pathlib import Path

import npt
import pytest

import xen
from pageferry.guests.linux.debian import LinuxImage


@pytest.mark.parametrize("tool", npt.TOOLS)
def test_what_is_missing_is_said_with_the_command_that_installs_it(tool, tmp_path, monkeypatch, capsys):
    for other in npt.TOOLS.keys() - {tool}:
        (tmp_path / other).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert xen.main([]) == npt.NOT_RUN
    assert f"test-xen: {npt.TOOLS[tool]} not installed" in capsys.readouterr().out


def test_the_first_process_is_a_shell_script_that_starts_the_store_and_then_the_tests():
    script = xen.init_script("python -m pytest -k 'one and two'")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    command = next(line for line in script.splitlines() if line.startswith("chroot"))
    assert command.index("xenstored") < command.index("xen-init-dom0") < command.index("pytest")
    assert "PAGEFERRY_REQUIRE_XEN=1" in command


def test_dom0_is_a_module_of_xen_and_finds_both_file_systems(tmp_path):
    image = LinuxImage.of(tmp_path)
    command = xen.qemu_command(Path("xen"), Path("root"), image, tmp_path / "log", processors=1)
    assert command[command.index("-kernel") + 1] == "xen"
    kernel, initramfs = command[command.index("-initrd") + 1].split(",")
    assert (kernel.split()[0], initramfs) == (str(image.kernel), str(image.initramfs))
    assert command[command.index("-smp") + 1] == "1"
    assert [word for word in command if "mount_tag=host" in word or "mount_tag=xen" in word]


def test_only_packages_of_xen_and_ssh_are_unpacked():
    wanted = {"xen-utils-4.17", "xen-utils-common", "xenstore-utils", "libxenctrl4", "libxentoolcore1", "libyajl2"}
    wanted |= {"openssh-server", "openssh-client", "libwrap0"}
    others = {"libc6", "systemd", "python3"}
    assert {name for name in wanted | others if xen._UNPACKED.fullmatch(name)} == wanted
