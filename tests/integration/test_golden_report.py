"""The report of fixed runs, pinned whole: every count is the same each time, and of each time that it is one.

The guest stands still at a sync point, and everything that writes meanwhile does so inside an event of the engine.
"""

import json
import os
from pathlib import Path

import pytest

from mutation.trips import Engine, trip_of, write
from pageferry.core.events import RoundEnded, RoundProgress
from pageferry.core.policy import Action, Decision
from pageferry.engine.image.save import Save
from pageferry.engine.options import VerifyMode, WireOptions
from pageferry.hypervisor.domain import Domain
from pageferry.stream.packing import Packing
from pageferry.testing.lab import Lab

GOLDEN = Path(__file__).parents[1] / "golden" / "reports.json"
MEMORY_BYTES = 16 << 20


class Switches:
    """A policy: one round of pre-copy, then post-copy."""

    name = "switches"
    switches = True

    def decide(self, progress):
        """Switch."""
        return Decision(action=Action.POST_COPY, reason="enough was sent")


class Stops:
    """A policy: four rounds of pre-copy, the third throttled, then the pause."""

    name = "stops"

    def decide(self, progress):
        """Count."""
        done = len(progress.rounds) == 4
        throttle = 0.5 if len(progress.rounds) == 2 else 0.0
        return Decision(action=Action.STOP_AND_COPY if done else Action.NEXT_ROUND, reason="counted", throttle=throttle)


def writes(guest):
    """Return an observer that writes one page in every round, one in each round, and makes a page zero."""

    def disturb(event):
        if isinstance(event, RoundProgress) and event.index < 4:
            write(guest, 0, 100 + event.index)
            write(guest, 1 + event.index, 100)
            write(guest, 6, event.index % 2)
        elif isinstance(event, RoundEnded) and not event.stats.final:
            write(guest, 8, event.stats.index)

    return disturb


def moved(name, *, policy=None, **options):
    """Return the report of a migration."""
    lab = Lab(make_vm=Domain, memory_bytes=MEMORY_BYTES, seed=7, cpus=1)
    with trip_of(lab, Engine()) as (guest, trip):
        guest.memory.write(9 << 12, bytes(4096))
        return trip.go(policy=policy or Stops(), on_event=writes(guest), name=name, **options)


def saved(path):
    """Return the report of a save."""
    lab = Lab(make_vm=Domain, memory_bytes=MEMORY_BYTES, seed=7, cpus=1)
    with trip_of(lab, Engine()) as (guest, _):
        return Save(guest.vm, path, Stops(), on_event=writes(guest)).run()


RUNS = {
    "plain": lambda _: moved("plain", verify=VerifyMode.FULL),
    "audited": lambda _: moved("audited", verify=VerifyMode.AUDIT),
    "packed over three connections": lambda _: moved(
        "packed", verify=VerifyMode.FULL, wire=WireOptions(connections=3, compress=Packing.LZ4)
    ),
    "capped": lambda _: moved("capped", verify=VerifyMode.FULL, wire=WireOptions(bandwidth_bytes_per_s=64 << 20)),
    "post-copy": lambda _: moved("post-copy", policy=Switches(), verify=VerifyMode.FULL),
    "save": lambda folder: saved(folder / "guest"),
}


def pinned(value, name=""):
    """Return a report's value without what differs from run to run: times, and what is made of them."""
    if isinstance(value, dict):
        return {key: pinned(each, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [pinned(each) for each in value]
    if isinstance(value, float) and name != "throttle":
        return "a time"
    if name in ("save_ns", "fault_count", "urgent_pages", "waits") and value is not None:
        return "a number"
    if name == "file" and value is not None:
        return os.path.basename(value)
    return value


@pytest.mark.parametrize("run", RUNS)
def test_the_report_of_a_fixed_run_is_the_golden_one(tmp_path, run):
    report = RUNS[run](tmp_path).to_json()
    report.pop("explanation")  # words of rates, which are times
    assert json.loads(json.dumps(pinned(report))) == json.loads(GOLDEN.read_text())[run]


if (
    __name__ == "__main__"
):  # make them anew: PYTHONPATH=tests:tests/helpers python tests/integration/test_golden_report.py
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        reports = {run: pinned(make(Path(folder)).to_json()) for run, make in RUNS.items()}
    for each in reports.values():
        each.pop("explanation")
    GOLDEN.write_text(json.dumps(reports, indent=1) + "\n")
