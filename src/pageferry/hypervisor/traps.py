"""Traps: the instructions at which the vCPU must stop exactly, and how the emulator is made to.

Unicorn translates blocks of code and looks at stop requests between them only. Two kinds of instruction cannot wait:

- *I/O to a port that may have an effect* (exit, wait, sync, invalidate): the guest must not run on. Unicorn has no
  I/O intercepts, but the x86 has I/O *breakpoints*: a debug register that names a port traps (#DB) right after the
  access, with RIP behind it. DR0 to DR3 hold our ports; ring 3 can neither see nor change them, and the guest's own
  debug registers stay in its saved state.
- *RDTSC*: the emulator would give the host's counter. CR4.TSD makes it fault in ring 3, and we give the guest's.

A faulting RDTSC leaves the emulator believing that it is still delivering that fault: the next fault is reported as a
double fault, and those after it not at all; it just stops. RIP is exact all the same, so the vCPU decides by the
instruction at RIP, and renews the emulator when it must know which exception it was.
"""

from dataclasses import dataclass

from pageferry.devices.clock import CLOCK_PORT
from pageferry.devices.platform import EXIT_PORT, INVALIDATE_PORT, SYNC_PORT

CR4_TSD = 1 << 2

VECTOR_DEBUG = 1
VECTOR_DOUBLE_FAULT = 8
VECTOR_GENERAL_PROTECTION = 13

_NAMES = {
    0: "divide error",
    1: "debug trap",
    3: "breakpoint",
    4: "overflow",
    5: "bound range exceeded",
    6: "invalid opcode",
    7: "no FPU",
    8: "double fault",
    11: "segment not present",
    12: "stack fault",
    13: "general protection fault",
    14: "page fault",
    16: "x87 error",
    17: "alignment check",
    19: "SIMD error",
}

#: Ports whose accesses stop the vCPU, in fours as a debug register takes them.
TRAPPED_PORTS = (EXIT_PORT, CLOCK_PORT, SYNC_PORT, INVALIDATE_PORT)


def exception_name(vector: int) -> str:
    """Return what to call an exception in a crash message."""
    return _NAMES.get(vector, f"exception {vector}")


def is_trapped(port: int, size: int) -> bool:
    """Tell whether an access to a port hits one of the I/O breakpoints."""
    return any(port < base + 4 and base < port + size for base in TRAPPED_PORTS)


def arm_io_breakpoints() -> bytes:
    """Return ring-0 code that points DR0.. at the trapped ports and enables them; clobbers RAX.

    Source: AMD APM volume 2, DR7: R/W = 10b (I/O), LEN = 11b (4 bytes), one global enable per register.
    """
    code = b""
    dr7 = 0x400
    for index, port in enumerate(TRAPPED_PORTS):
        code += b"\xb8" + port.to_bytes(4, "little") + bytes((0x0F, 0x23, 0xC0 | index << 3))  # mov dr<index>, rax
        dr7 |= 2 << 2 * index | 0b1110 << (16 + 4 * index)
    return code + b"\xb8" + dr7.to_bytes(4, "little") + b"\x0f\x23\xf8"  # mov dr7, rax


@dataclass(frozen=True, slots=True)
class ReadTsc:
    """RDTSC, or RDTSCP with ``aux``."""

    length: int
    aux: bool


def decode_rdtsc(code: bytes) -> ReadTsc | None:
    """Return the instruction that ``code`` begins with if it reads the time-stamp counter."""
    if code[:2] == b"\x0f\x31":
        return ReadTsc(2, aux=False)
    return ReadTsc(3, aux=True) if code[:3] == b"\x0f\x01\xf9" else None
