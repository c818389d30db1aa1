"""The mutation suite: each fault in the implementation is found, on the first try, by each check named for it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from altered import alter
from tiers import sample

import mutation
from mutation import DECLARED, FAULTS, WRAPPED, Room, checks_of, lab_of, mutants, sound_benches
from mutation.fault import ODD, injected
from mutation.kvm_ring import full_before_clean
from mutation.mutants import Suite
from mutation.tracking import store_from_a_vcpu
from mutation.uffd import store_beside_the_first_fault
from pageferry.core.errors import UnsupportedError
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.domain import Domain
from pageferry.testing import CHECKS
from pageferry.testing.conformance import run_check
from pageferry.testing.lab import Lab

DOC = Path(__file__).parents[2] / "docs" / "mutants.md"
CASES = [(fault, check) for fault in FAULTS for check in fault.found_by]
FIRST = list({fault.room: (fault, fault.found_by[0]) for fault in reversed(FAULTS)}.values())


@pytest.mark.parametrize(
    ("fault", "name"),
    sample(CASES, "the mutants are to be found by the tests; one of each room is, in `make test`", quick=FIRST),
    ids=[f"{fault.name}-{name}" for fault, name in CASES],
)
def test_the_fault_is_found_by_the_check(request, fault, name):
    if fault.on_kvm:
        request.getfixturevalue("kvm_support")
    (check,) = [check for check in checks_of(fault) if check.name == name]
    try:
        error = run_check(check, lab_of(fault))
    except UnsupportedError as missing:
        pytest.skip(f"{missing} ({missing.hint})")
    assert error is not None, f"{name} did not find {fault.name}"
    assert "unexpected" not in error.detail  # by what it does, not because it does not run
    assert "internal error" not in error.detail


@pytest.mark.exhaustive("every check of a room, sound: its tests say so too")
@pytest.mark.parametrize("room", [Room.HYPERVISOR, Room.ENGINE])
def test_without_a_fault_nothing_is_found(room):
    benches = [bench for bench in sound_benches(kvm=False) if bench[0] is room]
    assert benches
    for _, lab, checks in benches:
        own = [check for check in checks if check not in CHECKS]  # the kit itself: test_log_dirty
        assert own
        assert [run_check(check, lab) for check in own] == [None] * len(own)


def test_the_store_between_two_steps_is_not_a_fault_by_itself():
    def store_before_clean(domain):
        alter(domain.paging, "clean_range", lambda sound: lambda gfns: (store_from_a_vcpu(domain), sound(gfns))[1])

    lab = Lab(make_vm=injected(Domain, store_before_clean), memory_bytes=ODD, seed=1)
    for name in {
        name for fault in FAULTS if fault.name in ("protect-before-swap", "clear-after-copy") for name in fault.found_by
    }:
        (check,) = [check for check in checks_of(FAULTS[0]) if check.name == name]
        assert run_check(check, lab) is None


def test_the_stores_beside_a_fault_are_not_a_fault_by_themselves(kvm_support):
    (fault,) = [fault for fault in FAULTS if fault.name == "uffd-first-of-a-batch-marked"]
    lab = lab_of(replace(fault, inject=store_beside_the_first_fault))
    (check,) = [check for check in checks_of(fault) if check.name in fault.found_by]
    assert run_check(check, lab) is None


def test_a_full_ring_before_each_clean_is_not_a_fault_by_itself(kvm_support):
    (fault,) = [fault for fault in FAULTS if fault.name == "ring-dropped-when-full"]
    lab = lab_of(replace(fault, inject=full_before_clean))
    for check in checks_of(fault):
        if check.name in fault.found_by:
            assert run_check(check, lab) is None


def test_a_fault_whose_step_is_gone_fails_loudly():
    domain = Domain(VmConfig(memory_bytes=ODD))
    with pytest.raises(AttributeError, match="no_such_step"):
        alter(domain.paging, "no_such_step", lambda sound: sound)
    domain.close()


def test_names_are_distinct_and_each_fault_says_what_it_is():
    everything = (*DECLARED, *WRAPPED)
    assert len({fault.name for fault in everything}) == len(everything)
    assert all(fault.summary.endswith(".") for fault in everything)
    assert all(fault.stands_for and fault.found_by for fault in FAULTS)
    assert {fault.law for fault in FAULTS} >= {1, 2, 3, 4, 5, 7}
    real = [fault for fault in FAULTS if not fault.stands_for.startswith("no bug on record")]
    assert len(real) >= 15
    assert any("device-marks-after-the-write" in fault.found_by for fault in FAULTS)


def test_the_package_names_all_its_modules():
    modules = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"__init__", Path(__file__).stem}
    assert set(re.findall(r":mod:`\.(\w+)`", mutation.__doc__)) == modules


def test_the_document_lists_the_faults_that_there_are():
    rows = re.findall(r"^\| `([a-z-]+)` \|(.*)$", DOC.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [
        fault.name
        for room in (Room.HYPERVISOR, Room.KVM, Room.UFFD, Room.ENGINE, Room.TRACKER)
        for fault in (*DECLARED, *WRAPPED)
        if fault.room is room
    ]
    assert not any("ESCAPED" in row for _, row in rows)


def test_the_command_reports_what_caught_a_fault_and_after_how_much(capsys):
    assert mutants.main(["--json", "peek-clears", "final-round-skipped"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sound_failures"] == []
    assert [(v["fault"], v["caught_by"], v["caught_law"]) for v in found["faults"]] == [
        ("peek-clears", "peek-changes-nothing", None),
        ("final-round-skipped", "written-after-the-last-count", 2),
    ]
    assert all(v["after_checks"] > 0 and v["after_cleans"] > 0 for v in found["faults"])
    assert mutants.main(["peek-clears"]) == 0
    assert "peek-changes-nothing (operator)" in capsys.readouterr().out


@pytest.mark.exhaustive("every check of a room, for a line of the command")
def test_a_fault_that_escapes_is_said_and_fails_the_command(capsys):
    harmless = replace(FAULTS[0], name="harmless", inject=lambda domain: None)
    assert mutants.main(["harmless"], Suite(faults=(harmless,))) == 1
    captured = capsys.readouterr()
    assert "ESCAPED" in captured.out
    assert "1 escaped: harmless" in captured.err


def test_an_implementation_that_fails_without_a_fault_fails_the_command(capsys):
    broken = Lab(make_vm=injected(Domain, FAULTS[0].inject), memory_bytes=ODD, seed=1)
    checks = [check for check in checks_of(FAULTS[0]) if check.name == "audit-each-round"]
    benches = [(Room.HYPERVISOR, broken, checks)]
    assert mutants.main([], Suite(faults=(), sound_benches=lambda kvm: iter(benches))) == 1
    assert "without any fault: hypervisor: audit-each-round (law 1)" in capsys.readouterr().err


def test_a_tracker_that_the_kernel_lacks_is_left_out_and_that_is_said(capsys):
    def refuse(machine):
        raise UnsupportedError("PAGEMAP_SCAN", "not in this kernel")

    lacking = replace(FAULTS[0], inject=refuse)
    benches = [(Room.UFFD, lab_of(lacking), CHECKS[:2])]
    assert mutants.main([], Suite(faults=(lacking,), sound_benches=lambda kvm: iter(benches))) == 0
    captured = capsys.readouterr()
    assert captured.err.count("left out: not in this kernel") == 2
    assert "0 faults" in captured.err


def test_without_kvm_its_faults_are_left_out_and_that_is_said(capsys):
    def refuse():
        raise UnsupportedError("kvm", "not here")

    assert mutants.main(["kvm-clear-forgotten"], Suite(probe=refuse)) == 0
    captured = capsys.readouterr()
    assert "faults of KVM are left out" in captured.err
    assert "0 faults" in captured.err
