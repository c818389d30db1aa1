import numpy as np
import pytest

from pageferry.core.memory import GuestMemory
from pageferry.guests.abi import GuestInfo
from pageferry.guests.workloads import load_workload
from pageferry.testing.oracle import StampOracle, explained_gfns, working_set_gfns

U64 = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15


def info_of(*, start=0x200000, pages=300, seed=9, arguments=(), regions=((0, 8 << 20),), cpus=1):
    return GuestInfo(
        memory_bytes=sum(size for _, size in regions),
        ram_regions=regions,
        cpus=cpus,
        working_set_gpa=start,
        working_set_bytes=pages * 4096,
        rate=0,
        seed=seed,
        arguments=arguments,
    )


def mix(x):
    """As docs/reference/guest-abi.md writes it."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & U64
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, U64])
@pytest.mark.parametrize("number", [0, 1, 0xFFFFFFFF])
@pytest.mark.parametrize("arguments", [(), (0,), (256,), (10, 200, 77)])
def test_the_generator_is_the_documented_one(seed, number, arguments):
    oracle = StampOracle(info_of(seed=seed, arguments=arguments))
    density = arguments[number % len(arguments)] if arguments else 64
    key = mix((seed + number * STEP) & U64)
    expected = [0x200 + i for i in range(300) if mix((key + i * STEP) & U64) & 255 < density]
    assert oracle.written(number).tolist() == expected
    assert oracle.words.tolist() == [mix((seed + i * STEP) & U64) & 511 for i in range(300)]


def test_the_default_density_is_a_quarter():
    oracle = StampOracle(info_of(pages=4096, regions=((0, 64 << 20),)))
    assert 0.2 < oracle.written(1).size / 4096 < 0.3
    assert oracle.written(1).tolist() != oracle.written(2).tolist()


def test_the_working_set_skips_the_hole():
    regions = ((0, 3 << 30), (4 << 30, 1 << 20))
    gfns = working_set_gfns(info_of(start=(3 << 30) - 8192, pages=5, regions=regions))
    assert gfns.tolist() == [0xBFFFE, 0xBFFFF, 0x100000, 0x100001, 0x100002]
    assert working_set_gfns(info_of(start=(4 << 30) + 4096, pages=2, regions=regions)).tolist() == [0x100001, 0x100002]


def test_wrong_memory_is_seen_whether_the_stamp_or_the_rest_is_wrong():
    oracle = StampOracle(info_of(arguments=(256,)))
    memory = GuestMemory.linear(8 << 20)
    oracle.played(5)
    oracle.played(6)

    def address(index):
        return 0x200000 + index * 4096 + int(oracle.words[index]) * 8

    for index in range(300):
        memory.write(address(index), (6).to_bytes(8, "little"))
    assert oracle.wrong_gfns(memory).size == 0
    memory.write(address(7), (5).to_bytes(8, "little"))
    memory.write(0x200000 + 8 * 4096 + (int(oracle.words[8]) * 8 + 8) % 4096, b"\x80")
    assert oracle.wrong_gfns(memory).tolist() == [0x207, 0x208]


def test_what_a_guest_may_write_besides_is_named_page_by_page():
    explained = explained_gfns(info_of(cpus=2), load_workload("kv")).tolist()
    assert explained == [0x2, *range(0x10, 0x16), *range(0xF0, 0x100), 0x101]
    assert np.unique(explained).size == len(explained)
