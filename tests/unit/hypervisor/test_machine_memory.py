import numpy as np
import pytest

from pageferry.core.errors import VmError
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.locks import LockRank, OrderedLock
from pageferry.hypervisor.machine_memory import INVALID_GFN, FrameOwner, MachineMemory

MiB = 1 << 20


def machine(extents_2m=4, pool_frames=8):
    return MachineMemory(extents_2m=extents_2m, pool_frames=pool_frames, paging_lock=OrderedLock(LockRank.PAGING))


def array(*values):
    return np.array(values, np.uint64)


def test_extents_come_from_the_top_down_and_belong_to_the_domain():
    made = machine()
    assert made.allocate_extent(512) == 3 * 512
    assert made.allocate_extent(3) == 2 * 512
    assert int(np.count_nonzero(made.owner == FrameOwner.DOMAIN)) == 515
    assert made.allocate_extent(1024) == 0
    with pytest.raises(VmError, match="no 1 contiguous frames"):
        made.allocate_extent(1)


def test_the_reverse_map_knows_whole_superpages_and_odd_tails():
    made = machine()
    made.m2p.set_extent(512, 4096, 512 + 3)
    asked = array(0, 511, 512, 1023, 1024, 1026, 1027)
    assert made.m2p.gfns(asked).tolist() == [int(INVALID_GFN)] * 2 + [4096, 4607, 4608, 4610] + [int(INVALID_GFN)]


def test_runs_of_frames_become_runs_of_gfns_across_extents():
    made = machine()
    made.m2p.set_extent(1024, 0, 512)
    made.m2p.set_extent(512, 512, 512)
    made.m2p.set_extent(0, 1024, 2)
    starts, lengths = made.m2p.run_gfns(array(0, 1020), array(5, 8))
    gfns = {gfn for start, n in zip(starts.tolist(), lengths.tolist(), strict=True) for gfn in range(start, start + n)}
    # Frames 0..4 hold gfns 1024, 1025 and nothing; 1020..1023 hold 1020..1023; 1024..1027 hold 0..3.
    assert gfns == {1024, 1025, 1020, 1021, 1022, 1023, 0, 1, 2, 3}


def test_the_pool_gives_zeroed_frames_up_to_its_allocation():
    pool = machine(pool_frames=3).pool
    first, second = pool.allocate(), pool.allocate()
    pool.tables[second - pool.first_mfn] = 7
    pool.release(second)
    assert pool.used == 1
    assert pool.allocate() == second
    assert not pool.tables[second - pool.first_mfn].any()
    assert pool.allocate() not in (None, first, second)
    assert pool.allocate() is None
    pool.release(first)
    pool.allocation = 2
    assert pool.allocate() is None


@pytest.mark.parametrize("memory_bytes", [4 * MiB + 4096 * 7, 32 * MiB, (3 << 30) + 5 * 4096])
def test_what_was_touched_is_found_again_by_gfn(memory_bytes):
    vm = Domain(VmConfig(memory_bytes=memory_bytes))
    memory = vm.memory
    wanted = sorted({0, 3, 4, 511, 512, 700, memory.gfn_limit - 1, memory.gfn_limit - 2})
    for gfn in wanted:
        memory.write(gfn << 12, b"x")
    starts, lengths = memory.populated()
    found = [gfn for start, n in zip(starts.tolist(), lengths.tolist(), strict=True) for gfn in range(start, start + n)]
    assert found == wanted
    assert all(b > a for a, b in zip((starts + lengths).tolist(), starts.tolist()[1:], strict=False))  # merged
    vm.close()


def test_a_large_guest_needs_few_host_mappings_and_gfn_is_not_mfn():
    vm = Domain(VmConfig(memory_bytes=64 << 30))
    ram = (gfn for gfn in range(0, vm.memory.gfn_limit, 100_003) if vm.memory.is_ram(gfn << 12))
    assert all(vm.p2m.lookup(gfn)[0] not in (0, gfn) for gfn in ram)
    begin, end = vm.memory.mapping.hva, vm.memory.mapping.hva + vm.memory.mapping.size_bytes
    with open("/proc/self/maps") as maps:
        assert sum(begin <= int(line.split("-")[0], 16) < end for line in maps) < 300
    assert vm.machine.pool.used == 2  # the root and one table of 1 GiB entries
    vm.close()
