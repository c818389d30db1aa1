"""Proof during pre-copy: what is proven is what was sent, whatever the guest does meanwhile."""

import threading

import numpy as np
import pytest
from altered import alter
from at_work import until
from tiers import sample

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M
from pageferry.core.memory import GuestMemory
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.verify.audit import Auditor, piece_pages
from pageferry.engine.verify.compare import AuditMismatchError, ReceivedPages
from pageferry.engine.verify.digests import digest_runs, first_difference

_GIVE_UP_S = 60.0


def gfns_of(*gfns):
    return np.array(sorted(gfns), np.uint64)


class Migration:
    """A guest, its dirty bits, a destination, and the auditor between them; the test is guest and sender."""

    def __init__(self, memory_bytes=8 << 20, piece_pages=8192):
        self.memory = GuestMemory.linear(memory_bytes)
        self.there = GuestMemory.linear(memory_bytes)
        self.dirty = DirtyBitmap(self.memory.gfn_limit)
        self.memory.on_write(self.dirty.set)
        self.received = ReceivedPages(self.there, audits=True)
        self.accounts = PageAccounts(self.memory.gfn_limit)
        self.auditor = Auditor(self.memory, self.accounts, self.dirty.copy, piece_pages=piece_pages)
        self.proofs = []

    def write(self, gfn, value):
        self.memory.write(gfn * PAGE_SIZE + 8, value.to_bytes(8, "little"))

    def clean(self):
        taken = self.dirty.copy()
        self.dirty.clear(taken.gfns())
        self.accounts.reported(taken)
        return taken.gfns()

    def send(self, gfns):
        for gfn in gfns.tolist():
            self.there.write(gfn * PAGE_SIZE, self.memory.read(gfn * PAGE_SIZE, PAGE_SIZE))
        self.received.arrived(gfns)
        self.accounts.sent(gfns)

    def deliver(self):
        """Let the destination check what is due; return the first gfn of a run that differs there, or None."""
        proof = self.auditor.due()
        if proof is None:
            return None
        self.proofs.append(proof)
        try:
            self.received.audit(proof.first_gfns, proof.pages, proof.digests)
        except AuditMismatchError as error:
            return error.first_gfn
        return None

    def finish(self):
        while not self.auditor.idle():
            self.auditor.wait(_GIVE_UP_S)
            assert self.deliver() is None

    def close(self):
        self.auditor.close()
        self.memory.close()
        self.there.close()


@pytest.fixture
def migration():
    made = Migration()
    yield made
    made.close()


@pytest.fixture
def piecemeal():
    """A migration whose pages are digested 64 at once."""
    made = Migration(piece_pages=64)
    yield made
    made.close()


@pytest.fixture
def during_digest(migration):
    """Run a function once, in the middle of the auditor's next digest: after the pages were read."""
    actions = []

    def then_act(views):
        def read(starts, lengths):
            content = [bytes(view) for view in views(starts, lengths)]
            if threading.current_thread().name == "audit" and actions:
                actions.pop()()
            return content

        return read

    alter(migration.memory, "views", then_act)
    return actions.append


def test_what_lies_still_is_proven(migration):
    gfns = [3, 4, 5, *range(500, 1600), 2047]
    for gfn in gfns:
        migration.write(gfn, gfn)
    migration.send(migration.clean())
    migration.auditor.start()
    migration.finish()
    assert migration.auditor.proven() == DirtyBitmap.of(2048, gfns)
    runs = [(int(a), int(n)) for p in migration.proofs for a, n in zip(p.first_gfns, p.pages, strict=True)]
    assert sorted(runs) == [(3, 3), (500, 12), (512, 512), (1024, 512), (1536, 64), (2047, 1)]  # none crosses 2 MiB
    assert migration.received.all_proven(gfns_of(3, 500), np.array([3, 1100], np.uint64))
    assert not migration.received.all_proven(gfns_of(2, 500), np.array([2, 1100], np.uint64))


def test_what_was_not_sent_is_not_proven(migration):
    migration.write(7, 1)
    migration.send(migration.clean())
    migration.write(8, 1)
    late = migration.clean()  # reported, still to be sent
    migration.auditor.start()
    migration.finish()
    assert migration.auditor.proven() == DirtyBitmap.of(2048, [7])
    migration.send(late)
    migration.finish()
    assert migration.auditor.proven() == DirtyBitmap.of(2048, [7, 8])


def test_a_page_written_while_it_was_digested_is_dropped(migration, during_digest):
    for gfn in (3, 700):
        migration.write(gfn, 1)
    migration.send(migration.clean())
    during_digest(lambda: migration.write(3, 2))
    migration.auditor.start()
    migration.finish()
    assert migration.auditor.proven() == DirtyBitmap.of(2048, [700])


def test_a_page_cleaned_and_sent_anew_while_it_was_digested_is_digested_anew(migration, during_digest):
    migration.write(3, 1)
    migration.send(migration.clean())

    def meanwhile():
        migration.write(3, 2)
        migration.send(migration.clean())  # its bit is clear again, its digest is the old content's

    during_digest(meanwhile)
    migration.auditor.start()
    migration.finish()
    assert migration.auditor.proven() == DirtyBitmap.of(2048, [3])
    assert len(migration.proofs) == 1


def test_a_report_takes_the_proof_back(migration):
    migration.write(3, 1)
    migration.send(migration.clean())
    migration.auditor.start()
    migration.finish()
    migration.write(3, 2)
    assert migration.auditor.proven().any()
    sent = migration.clean()
    assert not migration.auditor.proven().any()
    migration.send(sent)
    assert not migration.received.all_proven(gfns_of(3), gfns_of(1))
    migration.finish()
    assert migration.received.all_proven(gfns_of(3), gfns_of(1))


def test_nothing_is_due_while_a_write_may_be_unmarked(migration):
    migration.write(3, 1)
    migration.send(migration.clean())
    migration.auditor.start()
    with migration.memory.writing([(900 * PAGE_SIZE, 8)]):
        migration.auditor.wait(_GIVE_UP_S)
        assert migration.auditor.due() is None
    assert migration.auditor.due() is not None


def test_a_lost_bit_is_found(migration):
    for gfn in (3, 4, 900):
        migration.write(gfn, 1)
    migration.send(migration.clean())
    migration.write(900, 2)
    migration.dirty.clear(900)
    migration.auditor.start()
    found = None
    while found is None and not migration.auditor.idle():
        migration.auditor.wait(_GIVE_UP_S)
        found = migration.deliver()
    assert found == 900
    assert not migration.received.all_proven(gfns_of(900), gfns_of(1))


def test_a_frame_given_back_is_left_out(migration):
    for gfn in (3, 900):
        migration.write(gfn, 1)
    migration.send(migration.clean())
    migration.memory.remove(gfns_of(900))
    migration.auditor.start()
    migration.finish()
    assert migration.auditor.proven() == DirtyBitmap.of(2048, [3])


def test_a_failure_of_the_tracker_is_raised_where_it_is_asked(migration):
    def broken():
        raise RuntimeError("no PEEK today")

    auditor = Auditor(migration.memory, migration.accounts, broken, piece_pages=64)
    migration.accounts.sent(gfns_of(1))
    auditor.start()
    auditor.wait(_GIVE_UP_S)
    with pytest.raises(RuntimeError, match="no PEEK today"):
        auditor.due()
    auditor.close()
    auditor.close()


def test_the_oldest_proofs_come_first(migration):
    migration.auditor.start()
    for region in (2, 0, 1):
        first = region * PAGES_PER_2M
        for gfn in range(first, first + 10):
            migration.write(gfn, 1)
        migration.send(migration.clean())
        migration.finish()
    oldest = migration.auditor.oldest
    assert not oldest(9).any()
    assert (oldest(10).gfns() // PAGES_PER_2M).tolist() == [2] * 10
    assert sorted({*(oldest(29).gfns() // PAGES_PER_2M).tolist()}) == [0, 2]
    assert oldest(30) == migration.auditor.proven()


def test_more_than_one_piece(piecemeal):
    for gfn in range(0, 2048, 3):
        piecemeal.write(gfn, gfn)
    piecemeal.send(piecemeal.clean())
    piecemeal.auditor.start()
    piecemeal.finish()
    assert len(piecemeal.proofs) > 5
    assert piecemeal.auditor.proven().gfns().tolist() == list(range(0, 2048, 3))


def test_what_is_not_a_whole_piece_waits_until_the_sender_does(piecemeal):
    for gfn in range(0, 2048, 32):
        piecemeal.write(gfn, gfn + 1)
    piecemeal.auditor.start()
    for gfn in piecemeal.clean()[:63]:
        piecemeal.send(gfns_of(gfn))
        assert piecemeal.deliver() is None
    piecemeal.finish()
    (proof,) = piecemeal.proofs
    assert proof.pages.sum() == 63


def test_a_whole_piece_is_begun_while_the_sender_goes_on(piecemeal):
    for gfn in range(64):
        piecemeal.write(gfn, gfn + 1)
    piecemeal.auditor.start()
    piecemeal.send(piecemeal.clean())

    def proven():
        assert piecemeal.deliver() is None
        return piecemeal.proofs

    until(proven, "proof")
    assert piecemeal.auditor.proven().count() == 64


def test_the_auditor_is_not_woken_before_a_whole_piece_was_sent(piecemeal):
    accounts, told = piecemeal.accounts, []
    piecemeal.auditor.start()
    until(lambda: accounts.awaited_sendings == 64, "auditor")
    notify_all = accounts.changed.notify_all
    accounts.changed.notify_all = lambda: told.append(accounts.sendings) or notify_all()
    for gfn in range(64):
        piecemeal.write(gfn, gfn + 1)
    for gfn in piecemeal.clean():
        piecemeal.send(gfns_of(gfn))
    assert told[0] == 64


def test_pieces_grow_with_the_guest():
    assert [piece_pages(gibibytes << 18) for gibibytes in (1, 8, 16, 1024)] == [8192, 8192, 16384, 1 << 20]


@pytest.mark.parametrize("attempt", sample(range(20), "more of the same", quick=range(2)))
def test_whatever_the_guest_does_a_proof_is_of_what_was_sent(piecemeal, dice, attempt):
    piecemeal.auditor.start()
    waiting = gfns_of()
    for step in range(600):
        match dice.randrange(6):
            case 0 | 1 | 2:
                piecemeal.write(dice.randrange(200), step + 1)
            case 3 if not waiting.size:
                waiting = piecemeal.clean()
            case 4 if waiting.size:
                some = dice.randrange(waiting.size) + 1
                piecemeal.send(waiting[:some])
                waiting = waiting[some:]
            case _:
                assert piecemeal.deliver() is None
    piecemeal.send(waiting)
    piecemeal.finish()
    assert piecemeal.auditor.proven().any()
    clean = piecemeal.auditor.proven() - piecemeal.dirty
    starts, lengths = clean.runs()
    assert piecemeal.received.all_proven(starts, lengths)
    assert (
        first_difference(
            digest_runs(piecemeal.memory, starts, lengths),
            digest_runs(piecemeal.there, starts, lengths),
        )
        is None
    )
