"""What the help says of choices is what there is, and an option says what it is read as."""

import re
from pathlib import Path
from typing import get_args

import pytest
import typer

from pageferry.cli import main
from pageferry.cli.options import TrackerOption, device_specs, rate_option, wire_options
from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.hypervisor.paging import PAGING_MODES
from pageferry.kvm.trackers import TRACKERS
from pageferry.stream.packing import Packing

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "trackers.md"


def test_the_help_of_save_offers_only_what_a_save_can_do():
    command = typer.main.get_command(main.app_with(["save"])).commands["save"]
    helps = {parameter.name: parameter.help for parameter in command.params}
    assert helps["policy"] == "When to stop and copy: downtime, converge, deadline, xen, or module:Name."
    assert not [name for name, text in helps.items() if text and ("postcopy" in text or "migration" in text)]


def test_the_help_and_the_guide_name_every_tracker():
    help_text = get_args(TrackerOption)[1].help
    on_soft, on_kvm = re.fullmatch(r".*: (.*) \(soft\), (.*) \(kvm\)\.", help_text).groups()
    assert re.split(r", | or ", on_soft) == list(PAGING_MODES)
    assert re.split(r", | or ", on_kvm) == list(TRACKERS)
    costs = GUIDE.read_text().partition("| tracker | ENABLE |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(.*?)` \|", costs, re.M)) == {*PAGING_MODES, *TRACKERS}


@pytest.mark.parametrize(
    ("text", "backend", "readonly"),
    [
        ("/a", "/a", False),
        ("/a,readonly", "/a", True),
        ("/a,direct", "/a,direct", False),
        ("/a,direct,readonly", "/a,direct", True),
        ("/a,readonly,direct", "/a,direct", True),
        ("/a,b", "/a,b", False),
    ],
)
def test_a_disk_is_a_path_and_how_it_is_used(text, backend, readonly):
    disk, *_ = device_specs([text], None, console=False)
    assert disk == DeviceSpec(kind=DeviceKind.DISK, backend=backend, readonly=readonly)


def test_a_rate_that_is_not_given_leaves_what_is_kept_and_0_overrides_it():
    assert "x-bandwidth" not in wire_options(None, 1, Packing.NONE, None)
    assert wire_options("0", 1, Packing.NONE, None)["x-bandwidth"] == 0
    assert rate_option("1M") == {"x-bandwidth": 1 << 20}


def test_who_may_not_read_a_path_hears_so_from_what_reads_it():
    """The parser would only say that it is not readable, and ``--help`` as the hint."""
    commands = typer.main.get_command(main.app_with(main.COMMANDS)).commands
    paths = {
        (name, parameter.name): parameter.type
        for name, command in commands.items()
        for parameter in command.params
        if parameter.type.name in ("path", "file", "directory")
    }
    assert {("status", "control"), ("restore", "file"), ("run", "kernel"), ("migrate", "secret_file")} <= {*paths}
    assert [where for where, kind in paths.items() if kind.readable] == []
