"""The P2M against a dictionary: any order of whole-table, single and vectorised changes, and lookups in between."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pageferry.core.vm import VmConfig
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.p2m_types import P2MType

PAGES = 3 * 512 + 5
SOME_GFN = st.one_of(st.integers(0, PAGES + 3), st.sampled_from([0, 511, 512, 1023, 1024, 1535, 1536, PAGES - 1]))
RW, LOGDIRTY, MMIO = P2MType.RAM_RW, P2MType.RAM_LOGDIRTY, P2MType.MMIO_DM


class P2MAgainstADict(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.domain = Domain(VmConfig(memory_bytes=PAGES << 12))
        self.p2m = self.domain.p2m
        self.mfns = {gfn: self.p2m.lookup(gfn)[0] for gfn in range(PAGES)}
        self.types = dict.fromkeys(range(PAGES), RW)
        self.whole = set(range(3))  # superpages not yet split
        self.fresh = set()  # 2 MiB pieces touched since the last change of the whole table

    @rule(logdirty=st.booleans())
    def change_everything(self, logdirty):
        with self.p2m.lock:
            self.p2m.change_entry_type_global(logdirty=logdirty)
        self.types = dict.fromkeys(range(PAGES), LOGDIRTY if logdirty else RW)
        self.fresh = set()

    @rule(gfn=SOME_GFN, old=st.sampled_from([RW, LOGDIRTY]), new=st.sampled_from([RW, LOGDIRTY]))
    def change_one(self, gfn, old, new):
        with self.p2m.lock:
            changed = self.p2m.change_type(gfn, old, new)
        assert changed == (self.types.get(gfn) == old)
        if gfn < PAGES:
            self.fresh.add(gfn >> 9)
        if changed:
            self.types[gfn] = new
            self.whole.discard(gfn >> 9)

    @rule(gfns=st.sets(SOME_GFN, max_size=20), new=st.sampled_from([RW, LOGDIRTY]))
    def change_many(self, gfns, new):
        old = LOGDIRTY if new is RW else RW
        with self.p2m.lock:
            count = self.p2m.change_types(np.array(list(gfns), np.uint64), old, new)
        # Pages that were split off and whose recalculation is done: what CLEAN hands it is never anything else.
        reached = {gfn for gfn in gfns if gfn < PAGES and gfn >> 9 not in self.whole and self.types[gfn] == old}
        done = {gfn for gfn in reached if self.p2m.lookup(gfn)[1] == new}
        assert len(done) == count
        assert {gfn for gfn in reached if gfn >> 9 in self.fresh} <= done
        self.types.update(dict.fromkeys(done, new))

    @invariant()
    def lookups_agree(self):
        for gfn in (0, 1, 511, 512, 700, 1023, 1024, 1535, 1536, PAGES - 1):
            assert self.p2m.lookup(gfn) == (self.mfns[gfn], self.types[gfn])
        assert self.p2m.lookup(PAGES)[1] == MMIO

    def teardown(self):
        for gfn, p2m_type in self.types.items():
            assert self.p2m.lookup(gfn) == (self.mfns[gfn], p2m_type)
        with self.p2m.lock:
            self.p2m.change_entry_type_global(logdirty=False)
        invariants.check(self.domain)
        self.domain.close()


TestP2MAgainstADict = P2MAgainstADict.TestCase
TestP2MAgainstADict.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
