"""Entry states of a vCPU outside our guest ABI: in long mode, in protected mode, or waiting to be started.

Source: AMD APM volume 2, "Processor initialization state" and the descriptor formats of "Segmented virtual memory".
"""

import struct
from dataclasses import replace

from pageferry.core.state import DescriptorTable, MpState, Segment, VcpuState, reset_state

CODE_SELECTOR, DATA_SELECTOR = 0x10, 0x18

_FLAT = 0xFFFF_FFFF
_CODE_64, _CODE_32, _DATA = 0xA9B, 0xC9B, 0xC93  # present, ring 0, accessed; G; L or D
_CR0_PROTECTED, _CR0_PAGED = 0x11, 0x8005_0033
_CR4_PAE = 0x20
_EFER_LONG_MODE_ACTIVE = 0x500


def flat_gdt(*, long_mode: bool) -> bytes:
    """Return a GDT with flat ring-0 segments at ``CODE_SELECTOR`` and ``DATA_SELECTOR``, and nothing else."""
    return struct.pack("<4Q", 0, 0, _descriptor(_CODE_64 if long_mode else _CODE_32), _descriptor(_DATA))


def _descriptor(attributes: int) -> int:
    # Base 0, limit 4 GiB (bits 15..0 and 51..48); attributes 7..0 are bits 47..40, 11..8 are bits 55..52.
    return 0x000F_0000_0000_FFFF | (attributes & 0xFF) << 40 | (attributes >> 8) << 52


def protected_mode_state(*, rip: int, gdt_gpa: int, rax: int = 0, rbx: int = 0) -> VcpuState:
    """Return a vCPU in 32-bit ring 0, paging off, interrupts off, with the segments of :func:`flat_gdt`."""
    data = Segment(selector=DATA_SELECTOR, base=0, limit=_FLAT, attributes=_DATA)
    return replace(
        reset_state(),
        rip=rip,
        rax=rax,
        rbx=rbx,
        cr0=_CR0_PROTECTED,
        cs=Segment(selector=CODE_SELECTOR, base=0, limit=_FLAT, attributes=_CODE_32),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        gdtr=DescriptorTable(base=gdt_gpa, limit=len(flat_gdt(long_mode=False)) - 1),
        idtr=DescriptorTable(base=0, limit=0),
    )


def long_mode_state(*, rip: int, rsi: int, cr3: int, gdt_gpa: int) -> VcpuState:
    """Return a vCPU in 64-bit ring 0, paging on, interrupts off, with the segments of :func:`flat_gdt`."""
    return replace(
        protected_mode_state(rip=rip, gdt_gpa=gdt_gpa),
        rsi=rsi,
        cr0=_CR0_PAGED,
        cr3=cr3,
        cr4=_CR4_PAE,
        efer=_EFER_LONG_MODE_ACTIVE,
        cs=Segment(selector=CODE_SELECTOR, base=0, limit=_FLAT, attributes=_CODE_64),
    )


def waiting_state() -> VcpuState:
    """Return a vCPU as after reset that waits for another's INIT and SIPI, as all but the first of a PC do."""
    return replace(reset_state(), mp_state=MpState.UNINITIALIZED)
