"""The same guest and the same operators on real Xen and on the software hypervisor: what both answer, and what not."""

import errno
from functools import partial

import numpy as np
import pytest
from xen_machine import XenMachine

from pageferry.core.errors import LogDirtyError, UnsupportedError, XenError
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.domctl import ShadowOp, ShadowOpArguments, shadow_op
from pageferry.testing.lab import Lab

MEMORY_BYTES = 4 << 20
PAGES = MEMORY_BYTES >> 12
OUTSIDE = 0x3  # a frame that no guest touches
ENABLE, OFF, CLEAN, PEEK = ShadowOp.ENABLE_LOGDIRTY, ShadowOp.OFF, ShadowOp.CLEAN, ShadowOp.PEEK

#: A number plays that round of the guest; an operator, or one with a number of pages, is asked; "write": from outside.
SCRIPTS = {
    "rounds": (ENABLE, 1, CLEAN, 2, CLEAN, 3, PEEK, 4, PEEK, CLEAN, CLEAN, 5, CLEAN, OFF),
    "while-off": (PEEK, CLEAN, 3, PEEK, CLEAN, OFF, OFF),
    "enable-twice": (ENABLE, 3, ENABLE, CLEAN, OFF, ENABLE, PEEK, 3, CLEAN, OFF),
    "unknown": (99, 1, ENABLE, 99, OFF),
    "outside": (ENABLE, "write", CLEAN, "write", PEEK, OFF),
    "short": (ENABLE, 3, (PEEK, 64), (CLEAN, 64), PEEK, CLEAN, PEEK, OFF),
    "counts-only": (ENABLE, 3, (PEEK, None), PEEK, (CLEAN, None), PEEK, OFF),
}
#: What differs, by script and step; everything else is equal. See docs/internals/hypervisor.md, "On real Xen".
DIFFERENCES = {
    "short": {3: ["bits", "count"], 4: ["bits", "count"]},  # Xen has cleared what it did not return
    "counts-only": {4: ["bits"]},  # Xen has cleared the count only
}


def bits_of(data):
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")).tolist())


def of_xen(guest, op, pages):
    """Ask real Xen: errno, bits, dirty_count."""
    words = None if pages is None else np.zeros(PAGES // 64, np.uint64)
    try:
        stats = guest.vm.control.shadow_op(guest.vm.domid, op, words=words, pages=pages or 0)
    except XenError as error:
        return error.errno, set(), 0
    except LogDirtyError:
        return errno.ENOMEM, set(), 0
    return 0, set() if words is None else bits_of(words), stats.dirty_count


def of_the_model(guest, op, pages):
    """Ask the software hypervisor the same."""
    buffer = None if pages is None else bytearray(PAGES // 8)
    given = ShadowOpArguments(dirty_bitmap=buffer, pages=pages or 0)
    code = -shadow_op(guest.vm, op, given)
    if code:
        return code, set(), 0
    return 0, set() if buffer is None else bits_of(buffer), given.dirty_count


def answers(make_vm, ask, script):
    """Play a script on a machine; return one answer for each operator."""
    found = []
    with Lab(make_vm=make_vm, memory_bytes=MEMORY_BYTES, seed=1).stamping() as guest:
        try:
            for step in script:
                if step == "write":
                    np.frombuffer(guest.memory.mapping.view, np.uint8)[OUTSIDE << 12] += 1
                elif isinstance(step, int) and not isinstance(step, ShadowOp) and step < 90:
                    guest.play(step)
                else:
                    op, pages = step if isinstance(step, tuple) else (step, PAGES)
                    found.append((step, *ask(guest, op, pages)))
        finally:
            ask(guest, OFF, 0)
    return found


@pytest.mark.parametrize("paging", ["hap", "shadow"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_real_xen_and_the_model_answer_alike(control, name, paging):
    script = SCRIPTS[name]
    try:
        real = answers(partial(XenMachine, paging=paging), of_xen, script)
    except UnsupportedError as error:  # Debian's is built without shadow paging
        assert paging == "shadow"
        pytest.skip(str(error))
    model = answers(partial(Domain, paging_mode=paging), of_the_model, script)
    for at, (theirs, ours) in enumerate(zip(real, model, strict=True)):
        only = f"only xen {sorted(theirs[2] - ours[2])[:8]}, only model {sorted(ours[2] - theirs[2])[:8]}"
        told = [f"{code}, {len(bits)} bits, count {count}" for _, code, bits, count in (theirs, ours)]
        print(f"{name} {at} {theirs[0]!s:20} xen: {told[0]}; model: {told[1]}; {only}")
    different = {
        at: [what for what, a, b in zip(("errno", "bits", "count"), theirs[1:], ours[1:], strict=True) if a != b]
        for at, (theirs, ours) in enumerate(zip(real, model, strict=True))
    }
    assert {at: what for at, what in different.items() if what} == DIFFERENCES.get(name, {})
