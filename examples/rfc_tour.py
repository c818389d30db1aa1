"""The RFC on a running guest, step by step: what each operator does to the P2M and to the dirty bitmap.

Run it with ``.venv/bin/python examples/rfc_tour.py``. It needs no KVM. Its output is in
docs/internals/hypervisor.md, "A tour".
"""

import numpy as np

from pageferry.core.bitmap import DirtyBitmap, runs_of
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE
from pageferry.core.vm import VmConfig
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.domctl import LOGDIRTY_FINAL, ShadowOp, ShadowOpArguments, shadow_op
from pageferry.hypervisor.p2m_types import P2MType

#: The guest writes these eight pages of its memory in each round, and the page in which it counts its work.
WORKING_SET_GFN, WORKING_SET_PAGES = 0x800, 8
#: Pages that it never touches: one for another domain to grant, one for a device model to map.
GRANTED_GFN, MAPPED_GFN = 0xA00, 0xA01


class Tour:
    """A guest under log-dirty, and a line about each thing that happens to it."""

    def __init__(self) -> None:
        self.domain = Domain(VmConfig(memory_bytes=16 << 20))
        boot(
            self.domain,
            load_workload("stamp"),
            params=GuestParams(
                working_set_gpa=WORKING_SET_GFN << PAGE_SHIFT,
                working_set_bytes=WORKING_SET_PAGES * PAGE_SIZE,
                arguments=(256,),  # all pages in each round
            ),
        )
        self.domain.attach_sync(True)
        self.domain.resume()
        self.domain.wait()
        self._rounds = 0

    def write(self) -> None:
        """Let the guest write its working set once."""
        self._rounds += 1
        self.domain.reply_sync(self._rounds)
        self.domain.resume()
        self.domain.wait()

    def operator(self, op: ShadowOp, mode: int = 0) -> None:
        """Perform one operator as a toolstack does, and tell what it returned."""
        limit = self.domain.memory.gfn_limit
        bitmap = bytearray(limit // 8)
        result = ShadowOpArguments(mode=mode, dirty_bitmap=bitmap, pages=limit)
        code = shadow_op(self.domain, op, result)
        if code:
            raise OSError(-code, op.name)
        self.tell(op.name)
        if op in (ShadowOp.PEEK, ShadowOp.CLEAN):
            dirty = DirtyBitmap(limit, np.frombuffer(bitmap, np.uint64))
            print(f"    {result.dirty_count} dirty, {result.fault_count} nested page faults so far: {_frames(dirty)}")

    def tell(self, what: str) -> None:
        """Print what happened, and what the P2M says of the first page of the working set now."""
        mfn, p2m_type = self.domain.p2m.lookup(WORKING_SET_GFN)
        tables = self.domain.machine.pool.used - self.domain.machine.pool.reserved
        print(
            f"{what}\n    gfn {WORKING_SET_GFN:#x} is mfn {mfn:#x}, {P2MType(p2m_type).name.lower()}; "
            f"the P2M has {tables} tables"
        )


def _frames(dirty: DirtyBitmap) -> str:
    runs = zip(*(part.tolist() for part in runs_of(dirty.gfns())), strict=True)
    return " ".join(f"{first:#x}" + (f"..{first + pages - 1:#x}" if pages > 1 else "") for first, pages in runs) or "-"


def main() -> None:
    """Take the tour."""
    tour = Tour()
    domain = tour.domain
    tour.tell("the guest runs; nothing is logged")

    tour.operator(ShadowOp.ENABLE_LOGDIRTY)
    tour.write()
    tour.tell("the guest writes: its superpage is split, and what it writes becomes writable")
    tour.operator(ShadowOp.PEEK)
    tour.write()
    tour.tell("the guest writes the same again")
    tour.operator(ShadowOp.PEEK)

    tour.operator(ShadowOp.CLEAN)
    domain.memory.write((WORKING_SET_GFN << PAGE_SHIFT) + 8, b"DMA")
    tour.tell("a device writes: it marks, and gives no right")
    tour.operator(ShadowOp.CLEAN)

    domain.physmap.decrease_reservation(GRANTED_GFN)
    theirs = domain.machine.allocate_foreign()
    domain.physmap.map_grant(GRANTED_GFN, theirs, writable=True)
    mapping = domain.physmap.map_foreign(MAPPED_GFN, 1, writable=True)
    tour.tell(f"another domain grants a page at gfn {GRANTED_GFN:#x}; a device model maps gfn {MAPPED_GFN:#x}")
    tour.operator(ShadowOp.CLEAN)
    domain.machine.frame(theirs)[:5] = mapping.view[:5] = b"quiet"
    tour.tell("both are written, and no fault tells: they are dirty in every cycle")
    tour.operator(ShadowOp.CLEAN, LOGDIRTY_FINAL)
    mapping.unmap()
    domain.physmap.unmap_grant(GRANTED_GFN)
    tour.tell("both mappings end")
    tour.operator(ShadowOp.CLEAN)
    tour.operator(ShadowOp.CLEAN)

    tour.operator(ShadowOp.OFF)
    domain.close()


if __name__ == "__main__":
    main()
