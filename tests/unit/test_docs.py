"""What the documents and the comments name exists: files, modules and what is in them; tests, checks and faults."""

import pkgutil
import re
from pathlib import Path

import pytest

from mutation import DECLARED
from mutation.checks import CHECKS as HYPERVISOR_CHECKS
from pageferry.testing import CHECKS

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "docs", "benchmarks", "examples")
ROOMS = tuple(path.parent.name for path in (ROOT / "src" / "pageferry").glob("*/__init__.py"))
DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
#: All files and folders, each by a path that begins with a slash.
FILES = {
    f"/{path.relative_to(ROOT)}"
    for path in (*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))
}
#: ``.py`` files by any name, and whatever is said to be in one of our folders or rooms.
OURS = re.compile(rf"[\w./-]+\.py|(?:{'|'.join((*FOLDERS, *ROOMS))})/[\w./-]*")
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}
KNOWN = {check.name for check in (*CHECKS, *HYPERVISOR_CHECKS)} | {fault.name for fault in DECLARED}
#: What a reader makes by the documents.
THEIRS = {"mine.py"}
#: Words of the text with a hyphen that are neither checks nor faults; and all checks of a kind.
OTHERS = {"free-running-*"}


def missing(names):
    """Return which of these paths are the end of no path in the repository."""
    return {name for name in names if not any(path.endswith(f"/{name.rstrip('/')}") for path in FILES)}


def quoted(document):
    return re.findall(r"`([^`\n]+)`", document.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_module_that_a_document_names_exists(document):
    words = {word for code in quoted(document) for word in code.split()}
    assert not missing(word for word in words if OURS.fullmatch(word) and word not in THEIRS)
    for name in words:
        if match := re.fullmatch(rf"(?:pageferry\.)?((?:{'|'.join(ROOMS)})(?:\.\w+)+)(?:\(.*)?", name):
            pkgutil.resolve_name(f"pageferry.{match[1]}")


def anchors(document):
    """Return what a link to a part of this document may name: its headings, as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dangling(document, text):
    """Return the relative links of a document with this text that lead nowhere, to a file or to a heading in one."""
    lost = []
    for path, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(f"{path}#{anchor}")
    return lost


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(document):
    assert dangling(document, document.read_text()) == []


def test_a_link_that_leads_nowhere_is_found():
    text = "[b](no.md) [c](docs/internals/laws.md#laws) [d](docs/internals/laws.md#lawless) [e](#no)"
    assert dangling(ROOT / "README.md", text) == ["no.md#", "docs/internals/laws.md#lawless", "#no"]


def test_every_file_that_the_source_names_exists():
    named = re.compile(rf"\b(?:{'|'.join((*FOLDERS, *ROOMS))})/[\w./-]+\.(?:py|md)\b")
    found = {path: missing(named.findall(path.read_text())) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_module_and_class_that_the_source_refers_to_exists():
    for path in SOURCES:
        for name in re.findall(r":(?:mod|class|func|meth|attr|data):`~?(pageferry\.[\w.]+)`", path.read_text()):
            pkgutil.resolve_name(name)


@pytest.fixture(scope="module")
def names():
    return quoted(ROOT / "docs" / "internals" / "hypervisor.md")


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
