"""The parts of ``make test-npt`` that need no emulator."""

import io
import lzma
import shutil
import stat
import subprocess
import sys
import tarfile

import npt
import npt_image
import pytest

DIRECTORY, FILE = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644


def unpack(archive):
    """Read a "newc" archive back: path -> (mode, content)."""
    found, at = {}, 0
    while True:
        head = archive[at : at + 110]
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += (110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return found
        found[name[:-1].decode()] = (mode, archive[at : at + size])
        at += (size + 3) // 4 * 4


@pytest.mark.parametrize("size", range(5))
def test_an_archive_reads_back_whatever_the_padding(size):
    files = [("d", DIRECTORY, b""), *((f"d/{'n' * length}", FILE, b"x" * size) for length in range(1, 6))]
    assert unpack(npt_image.cpio(files)) == {path: (mode, content) for path, mode, content in files}


def test_an_empty_archive_is_a_trailer():
    assert unpack(npt_image.cpio([])) == {}


def test_each_name_follows_what_it_needs_and_comes_once():
    needs = {"a": ["b", "c"], "b": ["d"], "c": ["d", "b"], "d": []}
    order = npt_image.in_order(["c", "a"], needs.__getitem__)
    assert sorted(order) == ["a", "b", "c", "d"]
    for name, needed in needs.items():
        assert all(order.index(one) < order.index(name) for one in needed)


def package(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    return npt_image.PackageFiles(tarfile.open(fileobj=buffer))


def module(depends):
    return b"\x7fELF\0license=GPL\0depends=" + depends + b"\0name=x\0"


@pytest.fixture
def modules():
    return npt_image.Modules(
        package(
            {
                "lib/modules/1/kernel/kvm-amd.ko": module(b"kvm,irq-by"),
                "lib/modules/1/kernel/kvm.ko.xz": lzma.compress(module(b"irq-by")),
                "lib/modules/1/kernel/irq_by.ko": module(b""),
                "lib/modules/1/modules.builtin": b"kernel/drivers/virtio/virtio-pci.ko\n",
            }
        )
    )


def test_modules_are_found_by_the_kernels_name_for_them(modules):
    assert modules.load_order(["kvm_amd"]) == ["irq_by", "kvm", "kvm_amd"]
    assert modules.read("kvm") == module(b"irq-by")


def test_a_built_in_module_is_not_loaded(modules):
    assert modules.load_order(["virtio_pci", "irq_by"]) == ["irq_by"]


def test_a_module_that_is_missing_is_named(modules):
    with pytest.raises(npt_image.ImageError, match="no module 9p"):
        modules.load_order(["irq_by", "9p"])


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
    assert npt.run_machine(tmp_path, tmp_path, 0) == code


@pytest.mark.parametrize("status", [0, 1])
def test_a_machine_without_a_result_is_a_failure_and_shows_its_kernel_log(tmp_path, monkeypatch, capsys, status):
    emulator(tmp_path, monkeypatch, script=f"raise SystemExit({status})")
    assert npt.run_machine(tmp_path, tmp_path, 0) == npt.NOT_RUN
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
    assert npt.run_machine(tmp_path, tmp_path, 0) == npt.NOT_RUN
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

    def command(kernel, initramfs, log, part):
        return [sys.executable, "-c", f"print('part', {part}); raise SystemExit({(0x40 + part) * 2 + 1})"]

    monkeypatch.setattr(npt, "CACHE", tmp_path)
    monkeypatch.setattr(npt, "qemu_command", command)
    monkeypatch.setattr(npt, "build_image", lambda *_, **__: (tmp_path, tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert npt.main([]) == 1
    said = capfd.readouterr().out
    assert "part 0" in said
    assert "part 1" in said
    assert "exit code 1 after" in said
