"""What ``pip install .`` puts into an empty environment moves a guest, away from the source tree."""

import subprocess
import venv
from pathlib import Path

import pytest

import pageferry

ROOT = Path(__file__).parents[2]


def do(*command, folder):
    return subprocess.run(
        list(map(str, command)), cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )


@pytest.mark.exhaustive("it fetches packages")
@pytest.mark.timeout(900)
def test_an_installed_pageferry_moves_a_guest(tmp_path):
    venv.create(tmp_path / "empty", with_pip=True)
    there = tmp_path / "empty/bin"
    installed = do(there / "pip", "install", "--quiet", ROOT, folder=tmp_path)
    if "No matching distribution" in installed.stderr:
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    moved = do(there / "pageferry", "demo", "--downtime-limit", "60000", folder=tmp_path)
    assert moved.returncode == 0, moved.stderr
    assert "migration completed" in moved.stdout
    assert "yes: all" in moved.stdout
    where = do(there / "python", "-c", "import pageferry; print(pageferry.__file__)", folder=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(tmp_path)
    version = do(there / "pageferry", "--version", folder=tmp_path)
    assert version.stdout == f"pageferry {pageferry.__version__}\n"
