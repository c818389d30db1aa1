"""The walker against a slow, literal one: random tables, random rights, random accesses."""

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.hypervisor.guest_walk import GuestPageFault, GuestWalker

FRAMES, TABLES = 8, (1, 2, 3, 4, 5)  # each table serves at any level, as data, and as its own child
INDICES = (0, 1, 511)
RESERVED = tuple(1 << bit for bit in (7, 13, 20, 29, 48, 51, 63))
MODES = ("user", "write_protect", "no_execute", "smep", "smap", "alignment_check")


def random_entry(random):
    entry = random.choice(TABLES) << 12 | 7
    if random.random() < 0.15:
        entry = random.choice((512, 1 << 18, 1 << 30)) << 12 | 0x87
    if random.random() < 0.25:
        entry ^= random.choice((1, 2, 4, 2, 4))
    if random.random() < 0.08:
        entry |= random.choice(RESERVED)
    return entry | random.choice((0, 0x20, 0x60, 1 << 63 if random.random() < 0.2 else 0))


def random_gva(random):
    if random.random() < 0.03:
        return random.getrandbits(64)
    low = sum(random.choice(INDICES) << shift for shift in (39, 30, 21, 12)) + random.getrandbits(12)
    return low | (0xFFFF << 48 if low >> 47 else 0)


def literal_walk(memory, gva, access, mode):
    """Return ("fault", error code or None) or ("gfn", gfn); sets A and D in ``memory``. As the manual tells it."""
    if gva >> 47 not in (0, (1 << 17) - 1):
        return "fault", None
    error = (2 if access == "write" else 0) | (4 if mode["user"] else 0)
    if access == "fetch" and (mode["no_execute"] or mode["smep"]):
        error |= 16
    table, used = 1, []
    for level in (4, 3, 2, 1):
        index = gva >> (12 + 9 * (level - 1)) & 511
        entry = memory.get((table, index), 0)
        if not entry & 1:
            return "fault", error
        large = bool(entry >> 7 & 1) and level > 1
        must_be_zero = [*range(48, 52)]
        if not mode["no_execute"]:
            must_be_zero.append(63)
        if large:
            must_be_zero += {4: [7], 3: range(13, 30), 2: range(13, 21)}[level]
        if any(entry >> bit & 1 for bit in must_be_zero):
            return "fault", error | 9
        used.append(entry)
        last = large or level == 1
        if last:
            break
        memory[table, index] = entry | 0x20
        table = entry >> 12 & (1 << 40) - 1
    writable, user = all(e & 2 for e in used), all(e & 4 for e in used)
    no_execute = any(e >> 63 for e in used)
    if mode["user"]:
        allowed = user and (access != "write" or writable) and (access != "fetch" or not no_execute)
    elif access == "write":
        allowed = writable or not mode["write_protect"]
    elif access == "fetch":
        allowed = not no_execute and not (mode["smep"] and user)
    else:
        allowed = True
    if not mode["user"] and access != "fetch" and mode["smap"] and user and not mode["alignment_check"]:
        allowed = False
    if not allowed:
        return "fault", error | 1
    memory[table, index] = entry | 0x20 | (0x40 if access == "write" else 0)
    span = 1 << 9 * (level - 1)
    return "gfn", (entry >> 12 & (1 << 40) - 1) // span * span + (gva >> 12) % span


@settings(max_examples=300)
@given(seed=st.integers(0, (1 << 32) - 1))
def test_the_walker_is_the_literal_one(seed):
    random = Random(seed)
    filled = {(table, index): random_entry(random) for table in TABLES for index in INDICES}
    mode = {name: random.random() < 0.5 for name in MODES}
    words = np.zeros(FRAMES * 512, np.uint64)
    for (table, index), entry in filled.items():
        words[table * 512 + index] = entry
    walker = GuestWalker(memoryview(words), lambda gfn: gfn if gfn < FRAMES else 0)  # beyond: an empty frame
    walker.cr3 = 1 << 12
    for name, value in mode.items():
        setattr(walker, name, value)
    memory, flushing = dict(filled), random.random() < 0.5
    for _ in range(20):
        gva, access = random_gva(random), random.choice(("read", "write", "fetch"))
        if flushing:
            walker.flush()
        expected = literal_walk(memory, gva, access, mode)
        try:
            found = "gfn", walker.translate(gva, write=access == "write", fetch=access == "fetch")[0]
        except GuestPageFault as refused:
            found = "fault", refused.error_code
        assert found == expected
        assert {at: int(words[at[0] * 512 + at[1]]) for at in filled} == memory
