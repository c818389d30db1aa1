import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from shortage import no_more_threads

from pageferry.core.bitmap import DirtyBitmap, expand_runs
from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.engine.verify import digests as verify

MiB, GiB = 1 << 20, 1 << 30


def u64(*values):
    return np.array(values, np.uint64)


@pytest.fixture
def memory():
    memory = GuestMemory.linear(16 * MiB)
    memory.write(0x5000, b"five")
    memory.write(5 * MiB, bytes(range(256)) * 4096 * 4)
    return memory


def test_what_is_digested_is_what_has_storage_in_runs_of_at_most_2_mib(memory):
    starts, lengths = verify.populated_runs(memory)
    assert expand_runs(starts, lengths).tolist() == [5, *range(5 * 256, 9 * 256)]
    assert max(lengths.tolist()) <= 512


def test_digests_are_xxh3_128_of_each_run(memory):
    digests = verify.digest_runs(memory, u64(5, 1280), u64(1, 3))
    assert bytes(digests[0]) == xxhash.xxh3_128_digest(b"five".ljust(4096, b"\0"))
    assert bytes(digests[1]) == xxhash.xxh3_128_digest(bytes(range(256)) * 48)
    assert verify.digest_runs(memory, u64(), u64()).shape == (0, 16)


def test_without_threads_to_be_had_one_digests_all(memory):
    starts, lengths = verify.populated_runs(memory)
    with no_more_threads():
        alone = verify.digest_runs(memory, starts, lengths)
    assert (alone == verify.digest_runs(memory, starts, lengths)).all()
    assert lengths.size > 1


def test_what_fails_on_a_thread_that_helps_is_raised():
    views = [memoryview(bytes(64)), "no memory"]
    for _ in range(50):  # now one thread takes the second, now the other
        with pytest.raises(TypeError):
            verify.digest_views(views, u64(512, 512))


def test_the_first_difference_is_found(memory):
    starts, lengths = verify.populated_runs(memory)
    digests = verify.digest_runs(memory, starts, lengths)
    assert verify.first_difference(digests, digests.copy()) is None
    memory.write(6 * MiB + 5, b"!")
    changed = verify.digest_runs(memory, starts, lengths)
    index = verify.first_difference(changed, digests)
    assert starts[index] <= 6 * 256 < starts[index] + lengths[index]


def test_a_run_is_narrowed_to_the_pages_that_differ(memory):
    theirs = verify.page_digests(memory, 1280, 1024)
    assert not verify.different_pages(memory, 1280, theirs).size
    memory.write(7 * MiB - 1, b"xy")
    assert verify.different_pages(memory, 1280, theirs).tolist() == [7 * 256 - 1, 7 * 256]
    with pytest.raises(VmError):
        verify.different_pages(memory, memory.gfn_limit - 1, theirs)


def test_the_first_page_that_is_not_zero_is_found(memory):
    populated = DirtyBitmap(memory.gfn_limit)
    populated.set_runs(*memory.populated())
    assert verify.first_nonzero(memory, populated) == 5
    fresh = DirtyBitmap(memory.gfn_limit)
    fresh.set_range(3000, 100)
    memory.populate(u64(3000), u64(100))
    assert verify.first_nonzero(memory, fresh) is None
    memory.write(3050 * 4096 + 4095, b"\1")
    assert verify.first_nonzero(memory, fresh) == 3050


def test_the_hint_is_of_the_longest_runs_and_never_more_than_there_is():
    memory = GuestMemory.linear(4 * GiB)
    for gfn in [*range(0, 4000, 2), (3 * GiB >> 12) - 1]:
        memory.write(gfn << 12, b"x")
    memory.write(4 * GiB, bytes(3 * 4096))
    starts, lengths = memory.populated()
    hint = verify.hint_runs(starts, lengths)
    assert len(hint) == 1024
    assert hint[-1] == (4 * GiB >> 12, 3)
    covered = expand_runs(*(u64(*column) for column in zip(*hint, strict=True)))
    assert set(covered.tolist()) <= set(expand_runs(starts, lengths).tolist())
    assert sorted(hint) == list(hint)
    assert verify.hint_runs(*GuestMemory.linear(4 * MiB).populated()) == ()


@given(st.lists(st.integers(1, 512), max_size=300), st.integers(1, 2000), st.integers(1, 50))
def test_batches_cover_every_run_in_order(lengths, max_pages, max_runs):
    slices = list(verify.batches(u64(*lengths), max_pages, max_runs))
    assert [i for piece in slices for i in range(piece.start, piece.stop)] == list(range(len(lengths)))
    for piece in slices:
        assert 1 <= piece.stop - piece.start <= max_runs
        assert sum(lengths[piece.start : piece.stop - 1]) < max_pages


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_digests_do_not_depend_on_how_the_work_is_divided(lengths):
    memory = GuestMemory.linear(4 * MiB)
    memory.write(0, bytes(range(251)) * 10_000)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.uint64)
    digests = verify.digest_runs(memory, starts, u64(*lengths))
    wanted = [xxhash.xxh3_128_digest(view) for view in memory.views(starts, u64(*lengths))]
    assert [bytes(each) for each in digests] == wanted
