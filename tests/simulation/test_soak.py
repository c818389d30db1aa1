"""The soak, in short; that it finds what it is for; and one guest over every kind of machine."""

import os
from dataclasses import replace

import machines
import pytest
from altered import alter
from machines import KINDS, Kind
from tiers import sample

from mutation.fault import injected
from mutation.tracker_wrapper import Faithful, mutated
from pageferry.core.errors import PageferryError, UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE, gpa_of
from pageferry.core.policies import XenPolicy
from pageferry.core.vm import VmStatus
from pageferry.hypervisor.domain import Domain
from pageferry.testing.lab import Lab
from simulation import soak


def expect_works(kind):
    try:
        machines.expect_works(kind)
    except (UnsupportedError, VmError) as error:
        pytest.skip(f"{kind.name}: {error}")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", sample([3, 50], "minutes", quick=[3]))
def test_round_trips_drawn_by_chance(capsys, dice, count):
    seed = dice.getrandbits(32)
    assert soak.main(["--seed", str(seed), "--count", str(count)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"soak: seed {seed}, {count} round trips"
    assert sum(" there " in line for line in lines) == sum(" back " in line for line in lines) == count
    if os.environ.get("PAGEFERRY_REQUIRE_KVM") == "1":
        assert not any("kvm/kvm-bitmap is left out" in line for line in lines)


def test_a_seed_draws_the_same_lives_and_exactly_so_many_trips():
    first, second, other = (list(soak.lives(seed, 40, KINDS)) for seed in (1, 1, 2))
    assert first == second != other
    assert sum(len(life.legs) for life in first) == 80
    assert {leg.kind for life in first for leg in life.legs} == set(KINDS)
    assert len({life.memory_bytes for life in first}) > 1
    assert len({life.cpus for life in first}) > 1


class LosesAPage(Faithful):
    """Something writes a frame before each PEEK, which does not report it; the last round is a PEEK."""

    def peek(self):
        written = self._vm.memory.read_u64(0x3000) + 1
        self._vm.memory.write(0x3000, written.to_bytes(8, "little"))
        bitmap = self._sound.peek()
        bitmap.clear(3)
        return bitmap


def test_a_tracker_that_loses_a_page_is_found_and_the_seed_is_said_again(capsys):
    broken = Kind(accel="soft", tracker="hap", make_vm=mutated(Domain, LosesAPage))
    assert soak.main(["--seed", "1", "--count", "3"], [broken]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("soak: FAILED after 0 migrations, seed 1, 3 round trips: ")
    assert "first difference at gfn 0x3 " in last


def test_a_guest_that_finds_itself_damaged_ends_the_soak(capsys):
    made = []

    def damage_what_arrives(vm):
        made.append(vm)
        if len(made) == 2:
            last = gpa_of(vm.memory.gfn_limit - 1)  # in the working set, which ends with RAM
            alter(vm, "resume", lambda resume: lambda: (vm.memory.write(last, bytes([255]) * PAGE_SIZE), resume()))

    kind = replace(KINDS[-1], make_vm=injected(KINDS[-1].make_vm, damage_what_arrives))
    assert soak.main(["--seed", "1", "--count", "1"], [kind]) == 1
    assert "the guest ended: GuestEnd(exit_code=" in capsys.readouterr().out
    assert len(made) == 2


def test_what_does_not_work_here_is_left_out_and_that_is_said():
    def refuse(config):
        raise UnsupportedError("dreams", "this kernel has no dreams")

    dream = Kind(accel="soft", tracker="dream", make_vm=refuse)
    said = []
    assert machines.working((dream, KINDS[-1]), said.append) == (KINDS[-1],)
    assert said == ["soft/dream is left out: this kernel has no dreams"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("cpus", sample([1, 2], "two vCPUs include one", quick=[2]))
def test_a_running_guest_goes_to_every_kind_of_machine_and_back(kind, cpus):
    """From soft to each, to itself, and to soft again: live, verified, the guest checking itself all the way."""
    expect_works(kind)
    home = Kind(accel="soft", tracker="hap", make_vm=Domain)
    lab = Lab(make_vm=Domain, memory_bytes=(3 << 30) + 5 * 4096, seed=3, cpus=cpus)
    with lab.guest("kv", pages=100) as guest:
        vm = guest.vm
        vm.resume()
        for there in (kind, kind, home):
            last, (vm, report) = vm, soak.migrate(vm, soak.Leg(kind=there, policy=XenPolicy()))
            assert (report.source_accel, report.destination_accel) == (last.accel, there.accel)
            assert (report.tracker, vm.log_dirty.tracker) == (last.log_dirty.tracker, there.tracker)
            assert report.verified
            assert vm.status is VmStatus.RUNNING
            last.close()
            soak.until_checked(vm)
        vm.close()


def test_a_migration_that_fails_is_an_error_and_the_guest_stays():
    def refuse(config):
        raise UnsupportedError("room", "no room")

    with Lab(make_vm=Domain, memory_bytes=8 << 20, seed=3).guest("kv", pages=40) as guest:
        guest.vm.resume()
        nowhere = Kind(accel="soft", tracker="hap", make_vm=refuse)
        with pytest.raises(PageferryError, match="no room"):
            soak.migrate(guest.vm, soak.Leg(kind=nowhere, policy=XenPolicy()))
        soak.until_checked(guest.vm)
