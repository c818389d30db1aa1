"""What ``doctor`` and ``--accel auto`` are told."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
from descriptors import open_descriptors

from pageferry.cli.commands.tools import doctor as print_findings
from pageferry.core.confined import FORBIDDEN
from pageferry.core.errors import UnsupportedError, UsageError, VmError
from pageferry.core.vm import VmConfig
from pageferry.kvm import fds
from pageferry.kvm.probe import probe
from pageferry.kvm.probe_abi import expect_forbidden
from pageferry.kvm.probe_ring_0 import expect_ring_0
from pageferry.kvm.tss import does_port_io, tss_attributes
from pageferry.kvm.vm import KvmVm
from pageferry.vmm import doctor


@pytest.mark.kvm
def test_a_working_kvm_says_what_it_offers(kvm_support):
    assert kvm_support.api_version == 12
    assert kvm_support.capabilities["KVM_CAP_IMMEDIATE_EXIT"]


def test_a_missing_device():
    with pytest.raises(UnsupportedError, match="No such file") as caught:
        probe(Path("/dev/no-such-kvm"))
    assert caught.value.capability == "kvm"
    assert "soft" in caught.value.hint


def test_a_forbidden_device(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fds.os, "open", refuse)
    with pytest.raises(UnsupportedError, match="may not be opened") as caught:
        probe()
    assert caught.value.capability == "kvm-permission"
    assert "--accel soft" in caught.value.hint  # what else it says depends on the mode of the device here


def test_something_else_under_that_name():
    with pytest.raises(UnsupportedError, match="not a KVM device") as caught:
        probe(Path("/dev/null"))
    assert caught.value.capability == "kvm-api"


@pytest.mark.kvm
def test_another_api_version(kvm_support, monkeypatch):
    monkeypatch.setattr(fds.uapi, "KVM_API_VERSION", 13)
    with pytest.raises(UnsupportedError, match="speaks KVM API 12, not 13"):
        probe()


@pytest.mark.kvm
def test_a_guest_that_does_not_run(kvm_support, monkeypatch):
    monkeypatch.setattr("pageferry.kvm.trial._EXIT", b"\x0f\x0b")
    with pytest.raises(UnsupportedError, match="did not run") as caught:
        probe()
    assert caught.value.capability == "kvm-guest"


@pytest.mark.kvm
def test_a_machine_that_cannot_be_made_leaves_nothing_open(kvm_support, monkeypatch):
    before = kvm_descriptors()

    def refuse(*_):
        raise VmError("no")

    monkeypatch.setattr("pageferry.kvm.vm.set_cpuid", refuse)
    with pytest.raises(VmError, match="no"):
        KvmVm(VmConfig(memory_bytes=2 << 20, cpus=2))
    assert kvm_descriptors() == before


def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def kvm_descriptors():
    return {fd for fd in open_descriptors() if "kvm" in _target(fd)}


def mapped_vcpus():
    return {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "kvm-vcpu" in line}


@pytest.mark.kvm
def test_a_closed_machine_is_gone_from_the_kernel(kvm_support):
    descriptors, others = kvm_descriptors(), mapped_vcpus()  # a machine of another test may be held by its failure
    vm = KvmVm(VmConfig(memory_bytes=2 << 20))
    assert mapped_vcpus() - others
    vm.close()
    assert not mapped_vcpus() - others
    assert not kvm_descriptors() - descriptors


@pytest.mark.kvm
def test_impossible_machines(kvm_support):
    with pytest.raises(UsageError, match="multiple of 4096"):
        KvmVm(VmConfig(memory_bytes=(2 << 20) + 1))
    with pytest.raises(UnsupportedError, match="vCPUs"):
        KvmVm(VmConfig(memory_bytes=2 << 20, cpus=0))


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("offered", "works", "told"),
    [(0, False, "whenever it is read"), (1, True, "it cannot start all set"), (3, True, "and starts all set")],
)
def test_doctor_tells_how_the_dirty_bitmap_is_cleared(kvm_support, monkeypatch, offered, works, told):
    less = kvm_support.capabilities | {"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": offered}
    found = dataclasses.replace(kvm_support, capabilities=less)
    assert (found.manual_protect, found.initially_set) == (bool(offered & 1), bool(offered & 2))
    monkeypatch.setattr("pageferry.kvm.probe.probe", lambda: found)
    monkeypatch.setattr(doctor, "_trial", lambda *_, **__: "")
    findings = {finding.capability: finding for finding in doctor.examine()}
    assert findings["kvm-manual-protect"].works is works
    assert told in findings["kvm-manual-protect"].detail
    assert works or "nothing is lost" in findings["kvm-manual-protect"].advice


def test_a_host_whose_kvm_cannot_be_used_is_not_said_to_lack_ring_0(monkeypatch):
    def refuse(_):
        raise UnsupportedError("kvm-permission", "not by this user", hint="join its group")

    monkeypatch.setattr("pageferry.kvm.probe_ring_0.trial_guest", refuse)
    with pytest.raises(UnsupportedError, match=r"^not by this user$") as caught:
        expect_ring_0()
    assert caught.value.hint == "join its group"


def test_advice_that_doctor_has_given_is_not_said_again(monkeypatch, capsys):
    refused = {"works": False, "detail": "no", "advice": "join its group"}
    findings = [doctor.Finding(capability=name, **refused) for name in ("first", "second")]
    monkeypatch.setattr("pageferry.cli.commands.tools.examine", lambda: findings)
    print_findings()
    said = capsys.readouterr().out.splitlines()
    assert [line.split("→ ")[1] for line in said[1::2]] == ["join its group", "as for first"]


def test_a_guest_without_io_privilege_uses_ports_by_the_kind_of_tss_that_is_chosen(kvm_support):
    assert does_port_io(tss_attributes())


def test_each_instruction_that_the_guest_abi_forbids_ends_a_guest_on_this_host(kvm_support):
    assert expect_forbidden().startswith(f"each of {len(FORBIDDEN)} forbidden instructions ends a guest")
