"""What README and docs/ say to type works, and prints what they show."""

import re
import shutil
import textwrap

import pytest
import typer.main
from pages import LASTING, NOT_RUN, ROOT, Session, blocks_of, expect_printed, outputs_of, shape

import pageferry
from pageferry.cli.main import COMMANDS as NAMES
from pageferry.cli.main import app_with
from pageferry.core.errors import UnsupportedError
from pageferry.kvm.probe import probe

README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
GROUP = typer.main.get_command(app_with(NAMES))
COMMANDS = GROUP.commands


def options_of(command):
    """The options of a command, and of those that are grouped under it."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union({"--help"}, *map(options_of, getattr(command, "commands", {}).values()))


OPTIONS = {name: options_of(command) for name, command in COMMANDS.items()}
MAIN_OPTIONS = {option for parameter in GROUP.params for option in parameter.opts} | {"--help"}
#: Options of other programs that the documents speak of.
OTHERS = {"--set", "--cold", "--changes", "--quick", "--repeats", "--plot", "--json", "--editable", "--only"}
IMAGE = ROOT / "build/linux/cloud"


#: Documents whose Python a test of its own runs, for it takes more than to run it.
TESTED_IN = {"docs/guide/trackers.md": "tests/conformance/test_guide.py"}


def name_of(document):
    return str(document.relative_to(ROOT))


def to_type(kind):
    return [document for document in DOCUMENTS if any(block.language == kind for block in blocks_of(document))]


def kvm_works():
    try:
        probe()
    except UnsupportedError:
        return False
    return True


def in_order(document):
    why = "README's commands are run before each push"
    return pytest.param(document, id=name_of(document), marks=() if document == README else pytest.mark.exhaustive(why))


@pytest.mark.parametrize("document", [in_order(document) for document in to_type("sh")])
@pytest.mark.timeout(600)
def test_what_a_document_says_to_type_works_and_prints_what_it_shows(document, tmp_path):
    if document.stem == "linux" and not IMAGE.is_dir():
        pytest.skip("no Linux image: make linux-image")
    blocks = blocks_of(document)
    shown = outputs_of(blocks)
    shutil.copy(ROOT / "src/pageferry/guests/images/idle.elf", tmp_path / "mine.elf")
    for block in blocks:
        if block.language == "python":
            (tmp_path / "mine.py").write_text(block.text)
    session = Session(tmp_path)
    try:
        for command in (command for block in blocks if block.language == "sh" for command in block.commands()):
            if ("kvm" in command and not kvm_works()) or (document == README and command == "make demo-linux"):
                continue  # the second has a page that shows what it prints
            printed = session.do(command)
            if command in shown:
                expect_printed(shown[command], printed)
    finally:
        session.close()


@pytest.mark.parametrize("document", to_type("python"), ids=name_of)
def test_the_python_of_a_document_runs(document, capsys):
    if (test := TESTED_IN.get(name_of(document))) is not None:
        assert document.name in (ROOT / test).read_text()
        return
    for block in blocks_of(document):
        if block.language == "python":
            patient = block.text.replace(
                "acceptor.endpoint)", 'acceptor.endpoint, "xen")'
            )  # it regards no host's speed
            assert (patient != block.text) == (document == README)
            exec(compile(patient, name_of(document), "exec"), {"__name__": "document"})
    if document == README:
        assert shape(capsys.readouterr().out) == "running; it stood still for #"


def test_the_readme_and_the_docstring_have_one_example():
    (example,) = (block.text for block in blocks_of(README) if block.language == "python")
    assert textwrap.indent(example, "    ", lambda line: bool(line.strip())) in pageferry.__doc__


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_code_block_says_what_it_is(document):
    assert {block.language for block in blocks_of(document)} <= {"sh", "python", "text", "c"}


def test_what_is_not_run_is_rare():
    left_out = [block for document in DOCUMENTS for block in blocks_of(document) if NOT_RUN in block.text]
    assert all(re.search(rf"{NOT_RUN}\w+", block.text) for block in left_out)
    assert len(left_out) <= 6


def said(document):
    """Return the commands and options that a document names, in its text and in its blocks."""
    text = document.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", prose.replace("\n", " "))
    blocks = [block for block in blocks_of(document) if block.language == "sh"]
    return [*spans, *(command for block in blocks for command in block.commands())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_command_and_option_that_a_document_names_exists(document):
    for words in (text.split() for text in said(document)):
        options = [word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]+(=.*)?", word)]
        if "pageferry" in words[:2]:
            words = words[words.index("pageferry") + 1 :]
            assert not words or words[0] in COMMANDS or words[0].startswith("-") or words[0] == "COMMAND", words
            known = OPTIONS.get(words[0], MAIN_OPTIONS) if words else MAIN_OPTIONS
        elif words and words[0] in COMMANDS:
            known = OPTIONS[words[0]]
        elif words and words[0].startswith("--"):
            known = OTHERS | MAIN_OPTIONS | {option for options in OPTIONS.values() for option in options}
        else:
            continue
        assert set(options) <= known, words


def test_commands_that_last_are_commands():
    assert set(LASTING) <= set(COMMANDS)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [("round 0  10 pages  3.2 MiB", "round 7 1,100 pages 12 KiB"), ("machine: kvm (so)", "machine: soft (asked for)")],
)
def test_figures_are_not_compared(shown, printed):
    expect_printed(shown, printed)
    with pytest.raises(AssertionError):
        expect_printed(f"{shown} more", printed.partition(":")[0])
