"""Chaos in short; that a seed draws the same runs; and that what must not be is found, in processes that are broken."""

import random
from dataclasses import replace

import pytest

from pageferry.stream.ferry_frames import FrameType
from pageferry.testing.lab import Violation
from simulation import chaos
from simulation.chaos import Host, Plan, Run, plan

#: Put into a process: this is done as soon as the module that it is about is there.
PLANTED = """
import importlib.abc, importlib.machinery, sys

class Plant(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            exec({code!r}, vars(module))
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Plant())
"""
FIXED = {
    "way": "precopy",
    "guest": "kv",
    "accels": ("soft", "soft"),
    "memory_mib": 16,
    "working_set_kib": 64,
    "options": ("--policy", "xen"),
    "harm": "cut",
    "victim": "source",
    "span_s": 0.1,
}


@pytest.fixture
def host(tmp_path):
    return Host(folder=tmp_path, accels=("soft", "kvm"), linux=None, mounts=True)


@pytest.mark.exhaustive("each run is of several processes")
@pytest.mark.timeout(1200)
def test_some_runs(capsys, dice, tmp_path):
    """No Linux here, which takes a minute to boot."""
    assert chaos.main(["--seed", str(dice.getrandbits(32)), "--count", "8", "--image", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )


def test_a_seed_draws_the_same_runs_of_every_kind(host):
    def drawn(seed):
        return [plan(random.Random(f"{seed} {number}"), host) for number in range(200)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert {each.way for each in drawn(1)} == {"precopy", "postcopy", "save", "restore"}
    assert {each.harm for each in drawn(1)} == {"kill", "stop", "cut", "stall", "full"}
    assert len({each.frame for each in drawn(1)}) > 10


@pytest.fixture
def planted(host, tmp_path):
    """Does a run over processes in which, once a module is loaded, something else is done."""

    def run(module, code, **changes):
        (tmp_path / "sitecustomize.py").write_text(PLANTED.format(module=module, code=code))
        this = Run(Plan(**FIXED | changes), replace(host, within=("env",)), tmp_path)  # from nothing, not forked
        try:
            return this.go()
        finally:
            this.close()

    return run


#: A commit that is not answered is taken for one that is refused.
TWO_GUESTS = "Handoff.lost = Handoff.refused"
#: What has arrived and is proven is damaged, by zeros: entries are missed at once. Garbage might be searched for ever.
DAMAGED = """
sound = Comparison.conclude
def conclude(self):
    verified_pages, memory = sound(self), self._pages.memory
    starts, lengths = memory.populated()
    end = int(starts[-1] + lengths[-1])  # of the working set
    for gfn in range(end - 16, end):
        memory.write(gfn << 12, bytes(4096))
    return verified_pages
Comparison.conclude = conclude
"""


@pytest.mark.exhaustive("two processes each")
@pytest.mark.parametrize(
    ("module", "code", "says"),
    [
        ("pageferry.engine.handoff.custody", TWO_GUESTS, "destination1 is running, and is to be one of"),
        ("pageferry.engine.verify.compare", DAMAGED, "destination1 ended by itself"),
    ],
    ids=["two guests", "a damaged guest"],
)
def test_what_must_not_be_is_found(planted, module, code, says):
    with pytest.raises(Violation, match=says):
        planted(module, code, frame=FrameType.RUNNING)


@pytest.mark.exhaustive("three processes")
def test_a_run_over_sound_processes_ends_well(planted):
    assert planted("pageferry", "", frame=FrameType.RUNNING).endswith("at the destination")
