"""What is under examples/ runs, and prints what the documentation says that it prints."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tour_of_the_rfc_prints_what_docs_hypervisor_shows(capsys):
    runpy.run_path(str(ROOT / "examples/rfc_tour.py"), run_name="__main__")
    document = (ROOT / "docs/internals/hypervisor.md").read_text()
    (shown,) = re.findall(r"## A tour\n.*?```text\n(.*?)```", document, re.DOTALL)
    assert capsys.readouterr().out == shown
