"""The command line loads what it is asked for, and nothing else."""

import json
import os
import subprocess
import sys

import pytest
from processes import GIVE_UP_S

from pageferry.cli.main import COMMANDS, load

#: Each of these takes longer to load than `--help` or `status` to do all that they do.
DEAR = ("numpy", "unicorn", "rich", "ssl", "cryptography", "asyncio", "multiprocessing", "lz4", "zstandard", "pydantic")

#: Runs the command line, and tells on standard error what it has loaded.
_RUN = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.__stderr__))
from pageferry.cli.main import run
run()
"""


def loaded(*arguments):
    """The modules that a command loads."""
    command = [sys.executable, "-c", _RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIVE_UP_S, env=os.environ)
    return set(json.loads(done.stderr.splitlines()[-1]))


def expect_nothing_dear(modules):
    assert "pageferry.cli.main" in modules
    assert modules.isdisjoint(DEAR)


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("status", "--help")])
def test_help_loads_nothing_dear(arguments):
    expect_nothing_dear(loaded(*arguments))


def test_a_command_that_runs_guests_loads_what_it_needs_for_them():
    assert loaded("run", "--help").intersection(DEAR) == {"numpy", "ssl"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_of_each_what_its_own_help_says(name):
    where, help_line = COMMANDS[name]
    assert load(where).__doc__.splitlines()[0] == help_line


def test_status_loads_nothing_dear(start):
    guest = start("run", "idle", "--memory", "8M", "--accel", "soft")
    expect_nothing_dear(loaded("status", "--control", guest.control))
    expect_nothing_dear(loaded("status", "--control", guest.control, "--json"))
