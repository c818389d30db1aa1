"""What the documents name exists: tests, checks, faults and modules."""

import re
from pathlib import Path

import pytest

from mutation import DECLARED
from mutation.checks import CHECKS as HYPERVISOR_CHECKS
from pageferry.testing import CHECKS

ROOT = Path(__file__).parents[2]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}
KNOWN = {check.name for check in (*CHECKS, *HYPERVISOR_CHECKS)} | {fault.name for fault in DECLARED}
#: Words of the text with a hyphen that are neither checks nor faults; and all checks of a kind.
OTHERS = {"free-running-*"}


@pytest.fixture(scope="module")
def names():
    return re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "hypervisor.md").read_text())


def test_every_test_that_the_document_names_exists(names):
    named = {name for name in names if name.startswith("test_")}
    assert len(named) > 15
    assert named <= TESTS, named - TESTS


def test_every_check_and_fault_that_the_document_names_exists(names):
    named = {name for name in names if re.fullmatch(r"[a-z]+(-[a-z*]+)+", name)} - OTHERS
    assert len(named) > 40
    assert named <= KNOWN, named - KNOWN


def test_every_class_of_the_hypervisor_that_the_document_names_has_what_is_named(names):
    text = "\n".join(path.read_text() for path in (ROOT / "src" / "pageferry").rglob("*.py"))
    for owner, member in {tuple(name.split(".")[-2:]) for name in names if re.fullmatch(r"(\w+\.)+_?[a-z]\w+", name)}:
        if owner[0].isupper() and owner not in ("Domain",):
            assert re.search(rf"class {owner}\b", text), owner
            assert re.search(rf"(def |self\.|    ){member}\b", text), f"{owner}.{member}"
