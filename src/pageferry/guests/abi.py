"""Constants and layouts of the guest ABI.

The normative text is ``docs/reference/guest-abi.md``; ``programs/guest.h`` says the same to C (a test compares
the two).
"""

import struct
from dataclasses import dataclass

from pageferry.core.frames import SIZE_1G
from pageferry.core.memory import GuestMemory
from pageferry.core.state import VcpuState, ring_3_state
from pageferry.guests.page_tables import identity_map, identity_map_bytes

ABI_VERSION = 1
INFO_MAGIC = int.from_bytes(b"PFGUEST1", "little")

INFO_GPA = 0x1000
STATUS_GPA = 0x2000
PAGE_TABLES_GPA = 0x10000
PAGE_TABLES_LIMIT = 0xA0000
STACKS_TOP = 0x100000
STACK_BYTES = 0x8000
PROGRAM_BASE = 0x100000
#: Stacks may not reach down to the page tables.
MAX_CPUS = (STACKS_TOP - PAGE_TABLES_LIMIT) // STACK_BYTES

MAX_RAM_REGIONS = 4
MAX_ARGUMENTS = 8
_MAPPED_AT_LEAST = 4 << 30

_INFO = struct.Struct(f"<12Q{2 * MAX_RAM_REGIONS}Q{MAX_ARGUMENTS}Q")

STATUS_SLOT_BYTES = 0x80
STATE_RUNNING = 1
STATE_ENDED = 2
_SLOT = struct.Struct("<16Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestInfo:
    """The content of the information page; see docs/reference/guest-abi.md for each field."""

    memory_bytes: int
    ram_regions: tuple[tuple[int, int], ...]
    cpus: int
    working_set_gpa: int
    working_set_bytes: int
    rate: int
    seed: int
    arguments: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """Return the page's content up to its last defined field."""
        regions = [value for region in self.ram_regions for value in region]
        regions += [0] * (2 * MAX_RAM_REGIONS - len(regions))
        arguments = [*self.arguments, *[0] * (MAX_ARGUMENTS - len(self.arguments))]
        return _INFO.pack(
            INFO_MAGIC,
            ABI_VERSION,
            self.memory_bytes,
            self.cpus,
            self.working_set_gpa,
            self.working_set_bytes,
            self.rate,
            self.seed,
            STATUS_GPA,
            len(self.ram_regions),
            len(self.arguments),
            0,
            *regions,
            *arguments,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuStatus:
    """One vCPU's slot of the status page.

    ``work`` and ``checks`` only grow. ``error`` is 0, or the program's own code with ``detail`` (u64[4]) about it;
    ``values`` (u64[8]) are the program's own.
    """

    work: int
    checks: int
    state: int
    error: int
    detail: tuple[int, ...]
    values: tuple[int, ...]


def read_status(memory: GuestMemory, cpus: int) -> tuple[VcpuStatus, ...]:
    """Return what the guest says of itself, one record per vCPU (a moving picture while the guest runs)."""
    page = memory.read(STATUS_GPA, cpus * STATUS_SLOT_BYTES)
    slots = []
    for index in range(cpus):
        work, checks, state, error, *rest = _SLOT.unpack_from(page, index * STATUS_SLOT_BYTES)
        slots.append(
            VcpuStatus(
                work=work, checks=checks, state=state, error=error, detail=tuple(rest[:4]), values=tuple(rest[4:])
            )
        )
    return tuple(slots)


def read_work(memory: GuestMemory, cpus: int) -> int:
    """Return how many operations the guest has done by its own count, all vCPUs together; 0 if it does not count.

    Raises:
        VmError: the status page is not RAM.
    """
    return sum(status.work for status in read_status(memory, cpus))


def mapped_gib(end_of_ram: int) -> int:
    """Return how many GiB the identity map covers for a guest whose RAM ends at gpa ``end_of_ram``."""
    return (max(end_of_ram, _MAPPED_AT_LEAST) + SIZE_1G - 1) // SIZE_1G


def page_tables_end(end_of_ram: int) -> int:
    """Return the first gpa after the page tables."""
    return PAGE_TABLES_GPA + identity_map_bytes(mapped_gib(end_of_ram))


def page_tables(end_of_ram: int) -> bytes:
    """Return the page tables, to be written at ``PAGE_TABLES_GPA``: an identity map that ring 3 may use."""
    return identity_map(PAGE_TABLES_GPA, mapped_gib(end_of_ram), user=True)


def entry_state(entry: int, index: int) -> VcpuState:
    """Return the state in which vCPU ``index`` enters a program at gpa ``entry``."""
    return ring_3_state(
        rip=entry, rsp=STACKS_TOP - index * STACK_BYTES - 8, cr3=PAGE_TABLES_GPA, rdi=INFO_GPA, rsi=index
    )
