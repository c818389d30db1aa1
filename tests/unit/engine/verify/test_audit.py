"""Proof during pre-copy: what is proven is what was sent, whatever the guest does meanwhile."""

import threading
import time

import numpy as np
import pytest
from tiers import sample

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M
from pageferry.core.memory import GuestMemory
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.verify import audit
from pageferry.engine.verify import digests as verify
from pageferry.engine.verify.audit import Auditor
from pageferry.engine.verify.compare import AuditMismatchError, ReceivedPages

_GIVE_UP_S = 60.0


def gfns_of(*gfns):
    return np.array(sorted(gfns), np.uint64)


class Migration:
    """A guest, its dirty bits, a destination, and the auditor between them; the test is guest and sender."""

    def __init__(self, memory_bytes=8 << 20):
        self.memory = GuestMemory.linear(memory_bytes)
        self.there = GuestMemory.linear(memory_bytes)
        self.dirty = DirtyBitmap(self.memory.gfn_limit)
        self.memory.on_write(self.dirty.set)
        self.received = ReceivedPages(self.there, audits=True)
        self.accounts = PageAccounts(self.memory.gfn_limit)
        self.auditor = Auditor(self.memory, self.accounts, self.dirty.copy)
        self.proofs = []

    def write(self, gfn, value):
        self.memory.write(gfn * PAGE_SIZE + 8, value.to_bytes(8, "little"))

    def clean(self):
        taken = self.dirty.copy()
        self.dirty.clear(taken.gfns())
        self.accounts.cleaned(taken)
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
def during_digest(monkeypatch):
    """Run a function once, in the middle of the auditor's next digest: after half of the pages were read."""
    actions = []
    real = verify.digest_runs

    def digest_runs(memory, starts, lengths):
        digests = real(memory, starts, lengths)
        if threading.current_thread().name == "audit" and actions:
            actions.pop()()
        return digests

    monkeypatch.setattr(audit, "digest_runs", digest_runs)
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
    with migration.memory._writes:
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


def test_a_frame_given_back_is_left_out(migration, during_digest):
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

    auditor = Auditor(migration.memory, migration.accounts, broken)
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


def test_more_than_one_piece(migration, monkeypatch):
    monkeypatch.setattr(audit, "_PIECE_PAGES", 64)
    for gfn in range(0, 2048, 3):
        migration.write(gfn, gfn)
    migration.send(migration.clean())
    migration.auditor.start()
    migration.finish()
    assert len(migration.proofs) > 5
    assert migration.auditor.proven().gfns().tolist() == list(range(0, 2048, 3))


def test_what_is_no_whole_piece_waits_until_the_sender_does(migration, monkeypatch):
    monkeypatch.setattr(audit, "_PIECE_PAGES", 64)
    for gfn in range(0, 2048, 32):
        migration.write(gfn, gfn + 1)
    migration.auditor.start()
    for gfn in migration.clean()[:63]:
        migration.send(gfns_of(gfn))
        assert migration.deliver() is None
    migration.finish()
    (proof,) = migration.proofs
    assert proof.pages.sum() == 63


def test_a_whole_piece_is_begun_while_the_sender_goes_on(migration, monkeypatch):
    monkeypatch.setattr(audit, "_PIECE_PAGES", 64)
    for gfn in range(64):
        migration.write(gfn, gfn + 1)
    migration.auditor.start()
    migration.send(migration.clean())
    deadline_s = time.monotonic() + _GIVE_UP_S
    while not migration.proofs and time.monotonic() < deadline_s:
        assert migration.deliver() is None
        time.sleep(0.001)
    assert migration.auditor.proven().count() == 64


def test_pieces_grow_with_the_guest(monkeypatch):
    monkeypatch.setattr(audit, "_MAX_PIECES", 4)
    monkeypatch.setattr(audit, "_PIECE_PAGES", 64)
    migration = Migration()
    try:
        for gfn in range(2048):
            migration.write(gfn, gfn + 1)
        migration.auditor.start()
        migration.send(migration.clean())
        migration.finish()
        assert len(migration.proofs) == 4
    finally:
        migration.close()


@pytest.mark.parametrize("attempt", sample(range(20), "more of the same", quick=range(2)))
def test_whatever_the_guest_does_a_proof_is_of_what_was_sent(dice, attempt, monkeypatch):
    monkeypatch.setattr(audit, "_PIECE_PAGES", 64)
    migration = Migration()
    try:
        migration.auditor.start()
        waiting = gfns_of()
        for step in range(600):
            match dice.randrange(6):
                case 0 | 1 | 2:
                    migration.write(dice.randrange(200), step + 1)
                case 3 if not waiting.size:
                    waiting = migration.clean()
                case 4 if waiting.size:
                    some = dice.randrange(waiting.size) + 1
                    migration.send(waiting[:some])
                    waiting = waiting[some:]
                case _:
                    assert migration.deliver() is None
        migration.send(waiting)
        migration.finish()
        assert migration.auditor.proven().any()
        clean = migration.auditor.proven() - migration.dirty
        starts, lengths = clean.runs()
        assert migration.received.all_proven(starts, lengths)
        assert (
            verify.first_difference(
                verify.digest_runs(migration.memory, starts, lengths),
                verify.digest_runs(migration.there, starts, lengths),
            )
            is None
        )
    finally:
        migration.close()
