"""Where RAM lies, for each size of a guest."""

import pytest

from pageferry.core.errors import UsageError
from pageferry.core.ram import ram_layout, storage_bytes

MiB = 1 << 20
GiB = 1 << 30


@pytest.mark.parametrize(
    ("memory_bytes", "regions", "end"),
    [
        (2 * MiB, [(0, 2 * MiB)], 2 * MiB),
        (3 * GiB, [(0, 3 * GiB)], 3 * GiB),
        (3 * GiB + 4096, [(0, 3 * GiB), (4 * GiB, 4096)], 4 * GiB + 4096),
        (5 * GiB, [(0, 3 * GiB), (4 * GiB, 2 * GiB)], 6 * GiB),
    ],
)
def test_what_is_beyond_3_gib_goes_on_at_4_gib(memory_bytes, regions, end):
    assert [(region.gpa, region.size_bytes) for region in ram_layout(memory_bytes)] == regions
    assert storage_bytes(memory_bytes) == end


@pytest.mark.parametrize("size", [0, 4096, MiB, 2 * MiB + 1, 1 << 50, -4096])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(UsageError):
        ram_layout(size)
