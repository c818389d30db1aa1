"""The host's CPU: how it is described, and when a guest that moves is in danger because of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from pageferry.core import machine_code
from pageferry.core.cpuid import CpuidLeaf
from pageferry.core.host_cpu import cpu_warning, described, host_cpu, host_leaves

KEEPS = described((CpuidLeaf(1, 0, 0x00C0_6F2, 1, 2, 3),), keeps_cpuid=True)
SHOWS = replace(KEEPS, keeps_cpuid=False)
NEWER = replace(SHOWS, name="newer", features="0" * 16)


@pytest.mark.parametrize(
    ("signature", "numbers"),
    [
        (0x000C_06F2, (6, 0xCF, 2)),  # an Intel: extended model
        (0x00A2_0F12, (0x19, 0x21, 2)),  # an AMD: extended family and model
        (0x0000_0543, (5, 4, 3)),
    ],
)
def test_family_model_and_stepping_are_as_the_manuals_count_them(signature, numbers):
    cpu = described((CpuidLeaf(1, 0, signature, 0, 0, 0),), keeps_cpuid=True)
    assert (cpu.family, cpu.model, cpu.stepping) == numbers


@pytest.mark.parametrize(
    ("leaf", "subleaf", "registers", "counts"),
    [
        (1, 0, (0, 0, 1 << 12, 0), True),  # FMA
        (7, 0, (0, 1 << 5, 0, 0), True),  # AVX2
        (1, 0, (0, 3 << 24, 0, 0), False),  # the APIC id of the core that was asked
        (0xB, 0, (0, 0, 0, 3), False),
    ],
)
def test_the_digest_is_of_features_and_not_of_the_core_that_was_asked(leaf, subleaf, registers, counts):
    none = described((), keeps_cpuid=True)
    assert (described((CpuidLeaf(leaf, subleaf, *registers),), keeps_cpuid=True).features != none.features) is counts


def test_this_host_is_described_as_its_kernel_describes_it():
    if (cpu := host_cpu(keeps_cpuid=True)) is None:
        pytest.skip("no x86-64, or a host that lets no process make code")
    told = dict(
        map(str.strip, line.split(":", 1)) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    assert (cpu.family, cpu.model) == (int(told["cpu family"]), int(told["model"]))
    assert cpu.name == " ".join(told["model name"].split())


def test_another_processor_has_no_such_cpu(monkeypatch):
    monkeypatch.setattr(machine_code.platform, "machine", lambda: "aarch64")
    host_leaves.cache_clear()
    try:
        assert host_cpu(keeps_cpuid=True) is None
    finally:
        host_leaves.cache_clear()


@pytest.mark.parametrize(
    ("source", "destination", "says"),
    [
        (KEEPS, KEEPS, None),
        (KEEPS, replace(KEEPS, features="0" * 16), None),  # both show the guest its own table
        (KEEPS, None, None),
        (None, KEEPS, None),
        (None, None, None),
        (SHOWS, SHOWS, "and not its CPUID table (doctor: kvm-cpuid); the destination's CPU is the same"),
        (SHOWS, replace(SHOWS, name="renamed"), "the destination's CPU is the same"),
        (
            SHOWS,
            NEWER,
            "the destination (newer, family 6, model 207, stepping 2) may lack features that the guest uses",
        ),
        (SHOWS, KEEPS, "may lack features that the guest uses"),
        (SHOWS, None, "the destination may lack features that the guest uses"),
        (
            KEEPS,
            NEWER,
            "at the destination the guest will see that host's CPU (newer, family 6, model 207, stepping 2)",
        ),
    ],
)
def test_a_guest_that_sees_another_cpu_after_its_move_is_warned_of(source, destination, says):
    warning = cpu_warning(source, destination)
    assert warning is None if says is None else says in warning
