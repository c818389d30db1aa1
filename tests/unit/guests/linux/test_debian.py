import io
import lzma
import subprocess
import tarfile
from importlib.resources import files

import pytest

from pageferry.core.errors import UnsupportedError
from pageferry.guests.linux import debian


def test_each_name_follows_what_it_needs_and_comes_once():
    needs = {"a": ["b", "c"], "b": ["d"], "c": ["d", "b"], "d": []}
    order = debian.in_order(["c", "a"], needs.__getitem__)
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
    return debian.PackageFiles(tarfile.open(fileobj=buffer))


def module(depends):
    return b"\x7fELF\0license=GPL\0depends=" + depends + b"\0name=x\0"


@pytest.fixture
def modules():
    return debian.Modules(
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
    with pytest.raises(UnsupportedError, match="no module 9p"):
        modules.load_order(["irq_by", "9p"])


@pytest.mark.parametrize("script", ["init.sh", "work.sh"])
def test_the_scripts_are_a_shells(script):
    text = files("pageferry.guests.linux").joinpath(script).read_text()
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Put a program of the name apt-cache and apt-get first in PATH: a shell script."""

    def install(script):
        for name in ("apt-cache", "apt-get"):
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_what_apt_says_is_told_with_what_it_needs(apt, tmp_path, capsys):
    apt("echo 'E: no such package' >&2; exit 100")
    assert debian.main([str(tmp_path), "--only", "cloud"]) == 1
    said = capsys.readouterr().err
    assert "cloud: apt-get download --quiet busybox-static:amd64 failed: E: no such package" in said
    assert "hint: this needs Debian's package lists" in said


def test_without_apt_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert debian.main([str(tmp_path)]) == 1
    assert "apt-get is not installed" in capsys.readouterr().err
