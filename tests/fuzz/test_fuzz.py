"""The fuzzer in short, and that it finds what it is for. `make fuzz` runs it for as long as you like."""

import random
from dataclasses import replace

import pytest
from altered import AlteredDestination, alter

from fuzz import fuzz
from fuzz.fuzz import Fuzzer
from fuzz.script import RECORDED
from fuzz.seeds import TARGETS, destination_seeds, file_seeds, source_seeds
from fuzz.structure import Mutation, any_chunk, cut, joined, names_in
from fuzz.targets import DestinationTarget, QuickSource, SourceTarget, WrongError
from pageferry.core.errors import TruncatedError
from pageferry.core.ram import RamRegion
from pageferry.engine.handoff.give import Giver
from pageferry.engine.verify.compare import Comparison
from pageferry.hypervisor.domain import Domain

CASES = 20


@pytest.fixture
def fuzzers(dice):
    """Makes fuzzers of targets, and closes them."""
    made = []

    def make(target):
        made.append(Fuzzer(target, dice.getrandbits(32)))
        return made[-1]

    yield make
    for fuzzer in made:
        fuzzer.close()


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "qmp"])
def test_seeds_end_as_they_say_and_changed_ones_do_no_harm(fuzzers, name):
    """A recording that ends otherwise is of another protocol: python -m fuzz.record makes it anew."""
    fuzzer = fuzzers(TARGETS[name]())
    fuzzer.run_seeds()
    for number in range(CASES):
        fuzzer.run_case(number)


@pytest.mark.exhaustive("a minute; of each target but QMP, which has a process, the seeds and some cases go first")
@pytest.mark.timeout(900)
def test_a_minute(capsys, dice):
    assert fuzz.main(["--seed", str(dice.getrandbits(32)), "--seconds", "60"]) == 0, capsys.readouterr().out


def test_what_was_cut_is_the_same_together_and_all_of_it_is_known():
    turns = [turn for seed in destination_seeds().values() if seed.recorded for turn in seed.turns]
    turns += [turn for seed in file_seeds().values() for turn in seed.turns]
    chunks = [cut(turn.said) for turn in turns]
    assert [joined(each) for each in chunks] == [turn.said for turn in turns]
    names = names_in(chunks)
    assert {"preamble", "SOURCE_HELLO", "PAGE_DATA pages", "DIGESTS", "AUDIT", "PACKED_PAGES", "SWITCH"} < {*names}
    assert names.count("raw") == 1  # the content that follows PAGES
    assert len(list(RECORDED.iterdir())) == 12


def test_a_seed_and_a_number_draw_the_same_case():
    turns = [cut(turn.said) for turn in destination_seeds()["plain"].turns]

    def drawn(seed):
        draw = random.Random(seed)
        return [
            [joined(chunks) for chunks in Mutation(draw, lambda: any_chunk(turns, draw)).of(turns)] for _ in range(9)
        ]

    assert drawn(1) == drawn(1) != drawn(2)
    assert [joined(chunks) for chunks in turns] == [turn.said for turn in destination_seeds()["plain"].turns]


# -- faults, and what finds them ---------------------------------------------------------------------------------------


def run(fuzzer, cases=5000):
    """Run the seeds, and then cases until one is wrong."""
    fuzzer.run_seeds()
    for number in range(cases):
        fuzzer.run_case(number)


def found(fuzzer):
    """What the fuzzer says of a fault."""
    with pytest.raises(WrongError) as wrong:
        run(fuzzer)
    return str(wrong.value)


def test_a_page_that_is_taken_in_beside_ram_is_found(fuzzers):
    def takes_the_hole_for_ram(config):
        vm = Domain(config)
        if len(vm.memory.regions) > 1:
            last = vm.memory.regions[-1]
            vm.memory.regions = (RamRegion(gpa=0, size_bytes=last.gpa + last.size_bytes),)
        return vm

    seeds = {name: seed for name, seed in destination_seeds().items() if "hole" in name}
    seeds = {name: replace(seed, outcome="") for name, seed in seeds.items()}  # it is seen by its harm alone
    assert "written beside RAM, at ['0xc0000000']" in found(
        fuzzers(DestinationTarget(seeds=seeds, make_vm=takes_the_hole_for_ram))
    )


class BelievesDigests(Comparison):
    """Compares nothing."""

    def compare(self, digests):
        super().compare(digests)


@pytest.mark.exhaustive("some hundred cases until one is proven wrongly")
def test_a_destination_that_does_not_compare_is_found(fuzzers):
    kind = AlteredDestination.having({"destination.Comparison": BelievesDigests})
    seeds = {name: seed for name, seed in destination_seeds().items() if seed.recorded and name != "hole"}
    assert "with other memory" in found(fuzzers(DestinationTarget(seeds=seeds, kind=kind)))


def test_an_error_that_nothing_promises_is_found(fuzzers):
    def fails(config):
        vm = Domain(config)
        alter(vm, "load_state", lambda load_state: lambda state: {}["no such device"])
        return vm

    seeds = {"plain": destination_seeds()["plain"]}
    assert "internal error: KeyError" in found(fuzzers(DestinationTarget(seeds=seeds, make_vm=fails)))


class Hopeful(Giver):
    """Takes a commit that is not answered for one that is refused."""

    def give(self, peer, word):
        try:
            return super().give(peer, word)
        except (OSError, TruncatedError):
            self._handoff.refused()
            raise


def test_a_guest_that_may_run_twice_is_found(fuzzers):
    kind = QuickSource.having({"source.Giver": Hopeful})
    seeds = {name: replace(seed, outcome="") for name, seed in source_seeds().items()}
    assert "nobody promised that it never runs there" in found(fuzzers(SourceTarget(seeds=seeds, kind=kind)))
