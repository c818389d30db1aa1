"""A whole domain against plain dictionaries: operators, writes of every kind, ballooning, moves, mappings, exhaustion.

The oracle knows, for each frame: what it holds (one byte) or that it is removed; whether it is dirty; whether another
program can write it. It decides what every operator returns and what every access sees. Its invariants are checked
after each step.
"""

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from soft import access
from tiers import sample

from pageferry.core.errors import GuestCrash, LogDirtyError, LogDirtyMemoryError, P2MError, VmError
from pageferry.core.vm import VmConfig
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.npf import Resolution
from pageferry.hypervisor.p2m_types import WRITABLE, P2MType

SMALL = 3 * 512 + 5
GiB_PAGES = 512 * 512
EDGES = [0, 1, 511, 512, 513, 1023, 1024, 1535, 1536, SMALL - 1]
gfns = st.one_of(st.sampled_from(EDGES), st.integers(0, SMALL + 2))
some_gfns = st.sets(gfns, min_size=1, max_size=6)
bytes_ = st.integers(1, 255)


def array(values):
    return np.array(sorted(values), np.uint64)


class DomainAgainstDicts(RuleBasedStateMachine):
    @initialize(large=st.booleans())
    def create(self, large):
        # The large one begins as one 1 GiB entry; its frames are used near both ends only.
        self.pages = GiB_PAGES + 5 if large else SMALL
        self.domain = Domain(VmConfig(memory_bytes=self.pages << 12))
        self.memory, self.paging, self.physmap = self.domain.memory, self.domain.paging, self.domain.physmap
        self.content = {}  # gfn -> byte, 0 where absent
        self.removed = set()
        self.grants = {}  # gfn -> mfn
        self.foreign = []  # mappings, with their frames
        self.dirty = None  # the set, while log-dirty is on
        self.failed = False  # pages could not be told apart

    def at(self, gfn):
        """Spread the small numbers over the large guest, its odd tail included."""
        return gfn if self.pages == SMALL or gfn < 600 else self.pages - SMALL + gfn

    def is_ram(self, gfn):
        return gfn < self.pages and gfn not in self.removed

    def held(self):
        return set(self.grants) | {gfn for m in self.foreign if m.writable for gfn in m.gfns.tolist()}

    def mapped(self):
        return {gfn for mapping in self.foreign for gfn in mapping.gfns.tolist()}

    def wrote(self, *written):
        if self.dirty is not None:
            self.dirty |= set(written)

    # --- operators ---

    @rule()
    def enable(self):
        if self.dirty is not None:
            with pytest.raises(LogDirtyError, match="already"):
                self.paging.enable()
            return
        try:
            self.paging.enable()
        except LogDirtyMemoryError:
            pool = self.domain.machine.pool
            assert pool.needed + -(-self.pages // 32768) > pool.allocation
            return
        self.dirty, self.failed = self.held(), False

    @rule(clean=st.booleans())
    def report(self, clean):
        operator = self.paging.clean if clean else self.paging.peek
        if self.dirty is None or self.failed:
            with pytest.raises(LogDirtyError if self.dirty is None else LogDirtyMemoryError):
                operator()
            return
        assert set(operator().gfns().tolist()) == self.dirty
        if clean:
            self.dirty = self.held()

    @rule(low=st.integers(0, 24), words=st.integers(0, 24))
    def clean_a_range(self, low, words):
        first = self.at(64 * low) & -64
        gfns = range(first, first + 64 * words)
        if self.dirty is None or self.failed:
            with pytest.raises(LogDirtyError if self.dirty is None else LogDirtyMemoryError):
                self.paging.clean_range(gfns)
            return
        inside = {gfn for gfn in self.dirty if gfn in gfns}
        assert set(self.paging.clean_range(gfns).gfns().tolist()) == inside
        self.dirty = self.dirty - inside | {gfn for gfn in self.held() if gfn in gfns}

    @rule()
    def off(self):
        self.paging.off()
        self.dirty, self.failed = None, False

    @rule(mode=st.sampled_from(["hap", "shadow"]))
    def switch_the_paging_mode(self, mode):
        if self.dirty is not None:
            with pytest.raises(LogDirtyError, match="while log-dirty is on"):
                self.domain.set_paging_mode(mode)
            return
        try:
            self.domain.set_paging_mode(mode)
        except VmError:
            pool = self.domain.machine.pool
            assert mode == "shadow"
            assert pool.used + 16 > pool.allocation
            return
        assert self.paging.tracker == mode

    # --- writers ---

    @rule(gfn=gfns, value=bytes_)
    def the_guest_writes(self, gfn, value):
        gfn, domain = self.at(gfn), self.domain
        faults = self.paging.stats().fault_count if self.dirty is not None else 0
        if gfn in self.removed:
            with pytest.raises(GuestCrash):
                access(domain, gfn, write=True)
            return
        for _ in range(3):
            mfn, p2m_type = domain.p2m.lookup(gfn)
            if p2m_type in WRITABLE:
                break
            assert p2m_type == (P2MType.RAM_LOGDIRTY if gfn < self.pages else P2MType.MMIO_DM)
            expected = Resolution.RETRY if gfn < self.pages else Resolution.EMULATE
            assert access(domain, gfn, write=True) is expected
        if gfn >= self.pages:
            return
        domain.machine.frame(mfn)[0] = value
        self.content[gfn] = value
        if self.dirty is None:
            return
        stats = self.paging.stats()
        assert stats.fault_count - faults <= 1
        self.dirty.add(gfn)
        if stats.failed_allocations:
            self.failed = True
            self.dirty = set(self.paging._bitmap.gfns().tolist())  # more than was written, never less
            assert gfn in self.dirty

    @rule(gfn=gfns, value=bytes_)
    def a_device_writes(self, gfn, value):
        gfn = self.at(gfn)
        if not self.is_ram(gfn):
            with pytest.raises(VmError):
                self.memory.write(gfn << 12, bytes([value]))
            return
        self.memory.write(gfn << 12, bytes([value]))
        self.content[gfn] = value
        self.wrote(gfn)

    @rule(marked=some_gfns)
    def a_mark(self, marked):
        marked = {self.at(gfn) for gfn in marked}
        self.paging.mark(array(marked))
        self.wrote(*(gfn for gfn in marked if self.is_ram(gfn)))

    # --- ballooning ---

    @rule(given=some_gfns)
    def balloon_out(self, given):
        given = {self.at(gfn) for gfn in given}
        fits = all(self.is_ram(gfn) for gfn in given) and not given & (set(self.grants) | self.mapped())
        if self.changes(fits, lambda: self.physmap.decrease_reservation(array(given))):
            self.lose(given)

    @rule(given=some_gfns, removed=st.booleans())
    def balloon_in(self, given, removed):
        given = {self.at(gfn) for gfn in given}
        if removed and self.removed:
            given = set(sorted(self.removed)[: len(given)])
        if self.changes(given <= self.removed, lambda: self.physmap.populate_physmap(array(given))):
            self.removed -= given
            self.wrote(*given)

    @rule(old=gfns, new=gfns)
    def move(self, old, new):
        source, target = self.at(old), self.at(new)
        pinned = set(self.grants) | self.mapped()
        fits = self.is_ram(source) and target < self.pages and not {source, target} & pinned
        if self.changes(fits, lambda: self.physmap.add_to_physmap(source, target)) and source != target:
            value = self.content.get(source, 0)
            self.lose({source})
            self.removed.discard(target)
            self.content[target] = value
            self.wrote(target)

    def changes(self, fits, operation):
        """Do it; tell whether it was done. What does not fit is refused; want of table memory is an answer too."""
        if not fits:
            with pytest.raises(VmError):
                operation()
            return False
        try:
            operation()
        except P2MError:
            pool = self.domain.machine.pool
            assert pool.needed == pool.allocation
            return False
        return True

    def lose(self, given):
        self.removed |= given
        for gfn in given:
            self.content.pop(gfn, None)
        if self.dirty is not None:
            self.dirty -= given

    # --- other domains ---

    @rule(gfn=gfns, count=st.integers(1, 3), writable=st.booleans())
    def map_foreign(self, gfn, count, writable):
        wanted = [self.at(gfn) + n for n in range(count)]
        if not all(self.is_ram(gfn) for gfn in wanted):
            with pytest.raises(VmError):
                self.physmap.map_foreign(wanted[0], count, writable=writable)
            return
        self.foreign.append(self.physmap.map_foreign(wanted[0], count, writable=writable))
        if writable:
            self.wrote(*wanted)

    @precondition(lambda self: self.foreign)
    @rule(value=bytes_)
    def write_through_a_mapping(self, value):
        mapping = self.foreign[-1]
        if mapping.writable:
            mapping.view[0] = value
            self.content[int(mapping.gfns[0])] = value

    @precondition(lambda self: self.foreign)
    @rule()
    def unmap_foreign(self):
        self.foreign.pop(0).unmap()

    @rule(gfn=gfns, value=bytes_)
    def map_grant(self, gfn, value):
        gfn = self.at(gfn)
        if len(self.grants) > 3:
            return
        theirs = self.domain.machine.allocate_foreign()
        self.domain.machine.frame(theirs)[0] = value
        fits = gfn in self.removed
        if self.changes(fits, lambda: self.physmap.map_grant(gfn, theirs, writable=True)):
            self.grants[gfn] = theirs
            self.removed.discard(gfn)
            self.content[gfn] = value
            self.wrote(gfn)

    @precondition(lambda self: self.grants)
    @rule()
    def unmap_grant(self):
        gfn = min(self.grants)
        if self.changes(gfn not in self.mapped(), lambda: self.physmap.unmap_grant(gfn)):
            del self.grants[gfn]
            self.lose({gfn})

    # --- table memory ---

    @rule(spare=st.sampled_from([0, 1, 2, 3, None]))
    def set_allocation(self, spare):
        pool = self.domain.machine.pool
        self.domain.set_allocation(len(pool.tables) if spare is None else min(pool.needed + spare, len(pool.tables)))

    @rule()
    def join(self):
        with self.domain.locks.domain, self.domain.run_control.stopped(), self.domain.locks.p2m:
            self.domain.p2m.join()

    # --- what always holds ---

    @invariant()
    def all_agree(self):
        invariants.check(self.domain)
        memory = self.memory
        assert set(memory.removed().tolist()) == self.removed
        if self.dirty is not None:
            assert set(self.paging._bitmap.gfns().tolist()) == self.dirty
        for gfn in {self.at(gfn) for gfn in EDGES} | set(self.content):
            mfn, _ = self.domain.p2m.lookup(gfn)
            if self.is_ram(gfn):
                value = self.content.get(gfn, 0)
                assert memory.mapping.view[gfn << 12] == value
                assert self.domain.machine.frame(mfn)[0] == value

    def teardown(self):
        if hasattr(self, "domain"):
            for mapping in self.foreign:
                mapping.unmap()
            starts, lengths = self.memory.populated()
            stored = {gfn for s, n in zip(starts.tolist(), lengths.tolist(), strict=True) for gfn in range(s, s + n)}
            assert {gfn for gfn, value in self.content.items() if value} <= stored
            assert not stored & self.removed
            self.domain.close()


@pytest.mark.parametrize("lives", sample([5, 60], "more of the same", quick=[5]))
def test_a_domain_does_what_dicts_do(lives):
    # Without shrinking: a step of this machine costs milliseconds, and its steps are readable as they come.
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    run_state_machine_as_test(
        DomainAgainstDicts,
        settings=settings(max_examples=lives, stateful_step_count=40, deadline=None, phases=phases),
    )
