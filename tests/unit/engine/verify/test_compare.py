"""What a destination knows of its pages, and what it concludes at the pause."""

import numpy as np
import pytest

from pageferry.core.errors import RecordError, VerifyError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.engine.verify.compare import AuditMismatchError, Comparison, ReceivedPages
from pageferry.engine.verify.digests import digest_runs
from pageferry.stream.ferry_frames import Digests, Missing


def gfns(*numbers):
    return np.array(numbers, np.uint64)


@pytest.fixture
def memory():
    made = GuestMemory.linear(8 << 20)
    for gfn in range(10, 20):
        made.write(gfn * PAGE_SIZE, bytes([gfn]) * PAGE_SIZE)
    yield made
    made.close()


@pytest.fixture
def pages(memory):
    made = ReceivedPages(memory, audits=True)
    made.arrived(np.arange(10, 20, dtype=np.uint64))
    return made


def audit(pages, first, count):
    pages.audit(gfns(first), gfns(count), digest_runs(pages.memory, gfns(first), gfns(count)))


def digests(memory, *runs, audited=(), last=True):
    starts, lengths = gfns(*(first for first, _ in runs)), gfns(*(count for _, count in runs))
    said = np.array([run in audited for run in runs], np.bool_)
    theirs = digest_runs(memory, starts, lengths)
    theirs = np.where(said[:, None], np.uint8(0), theirs)
    return Digests(first_gfns=starts, pages=lengths.astype(np.uint32), digests=theirs, audited=said, last=last)


def test_what_arrives_is_marked_and_no_more_proven(pages):
    marked = []
    pages.memory.on_write(lambda frames: marked.extend(frames.tolist()))
    audit(pages, 10, 4)
    assert pages.all_proven(gfns(10), gfns(4))
    pages.arrived(gfns(12))
    assert marked == [12]
    assert not pages.all_proven(gfns(10), gfns(4))
    assert pages.all_proven(gfns(10, 13), gfns(2, 1))
    assert not pages.all_proven(gfns(1 << 40), gfns(1))


def test_an_audit_that_differs_names_its_run_and_proves_nothing(pages):
    theirs = digest_runs(pages.memory, gfns(10, 14), gfns(2, 3))
    pages.memory.mapping.view[15 * PAGE_SIZE] ^= 1
    with pytest.raises(AuditMismatchError) as differs:
        pages.audit(gfns(10, 14), gfns(2, 3), theirs)
    assert (differs.value.first_gfn, differs.value.pages) == (14, 3)
    assert not pages.all_proven(gfns(10), gfns(1))


def test_a_page_that_was_removed_and_arrives_is_ram_again(pages):
    assert pages.removed().size == 0
    pages.remove(gfns(30, 31, 1 << 40))
    pages.arrived(gfns(31))
    assert pages.removed().tolist() == [30]


def test_what_may_hold_something_is_what_arrived_as_soon_as_something_was_audited(pages, memory):
    memory.write(100 * PAGE_SIZE, b"x")
    assert pages.populated().count() == 11
    audit(pages, 10, 1)
    assert [part.tolist() for part in pages.populated().runs()] == [[10], [10]]


def test_without_audits_what_arrived_is_not_noted(memory):
    pages = ReceivedPages(memory, audits=False)
    pages.arrived(gfns(10))
    audit(pages, 10, 1)
    assert [part.tolist() for part in pages.populated().runs()] == [[10], [10]]  # by the host's word


def test_equal_memory_is_concluded_to_be(pages, memory):
    audit(pages, 14, 2)
    comparison = Comparison(pages, shared=False)
    assert comparison.compare(digests(memory, (10, 4), last=False)) is None
    assert comparison.begun
    assert comparison.compare(digests(memory, (14, 2), (16, 4), audited=[(14, 2)])) is None
    assert comparison.conclude() == 10


def test_a_difference_is_told_page_by_page(pages, memory):
    frame = digests(memory, (10, 2), (12, 8))
    memory.mapping.view[13 * PAGE_SIZE] ^= 1
    mismatch = Comparison(pages, shared=False).compare(frame)
    assert (mismatch.first_gfn, mismatch.page_digests.size) == (12, 8)


def test_an_audit_that_was_not_made_is_not_believed(pages, memory):
    comparison = Comparison(pages, shared=False)
    with pytest.raises(VerifyError, match="never proven equal"):
        comparison.compare(digests(memory, (10, 10), audited=[(10, 10)]))


def test_a_page_that_the_source_does_not_have_must_be_zero(pages, memory):
    for shared in (False, True):
        comparison = Comparison(pages, shared=shared)
        comparison.compare(digests(memory, (10, 9)))
        if shared:  # the ends share the memory: no other page exists
            assert comparison.conclude() == 9
        else:
            with pytest.raises(VerifyError, match="not zero here") as wrong:
                comparison.conclude()
            assert wrong.value.gfn == 19


def test_a_page_is_missing_or_proven_and_never_both(pages, memory):
    comparison = Comparison(pages, shared=False)
    comparison.take_missing(Missing(first_gfns=gfns(18), pages=gfns(2)))
    comparison.compare(digests(memory, (10, 8)))
    assert comparison.missing.gfns().tolist() == [18, 19]
    assert comparison.conclude() == 8
    comparison = Comparison(pages, shared=False)
    comparison.take_missing(Missing(first_gfns=gfns(18), pages=gfns(2)))
    comparison.compare(digests(memory, (10, 9)))
    with pytest.raises(VerifyError, match="proven that is missing"):
        comparison.conclude()


def test_only_ram_can_be_missing(pages, memory):
    comparison = Comparison(pages, shared=False)
    with pytest.raises(RecordError, match="outside the guest"):
        comparison.take_missing(Missing(first_gfns=gfns(memory.gfn_limit - 1), pages=gfns(2)))
    memory.remove(gfns(5))
    with pytest.raises(RecordError, match="not RAM"):
        comparison.take_missing(Missing(first_gfns=gfns(4), pages=gfns(3)))
    assert not comparison.missing.any()
