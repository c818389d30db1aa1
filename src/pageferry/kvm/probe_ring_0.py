"""Finding out by doing whether this host runs ring 0 of a guest natively, as an operating system needs it.

Some KVMs (seen: ``kvm_pvm``, which has no help from the processor) run ring 3 natively and interpret ring 0: hundreds
of times slower, and without all instructions. An operating system does not boot there, or not in a useful time.

Two guests run the same loop, one in each ring. What they cost is CPU time of this process, so that a busy host makes no
difference. Before the loop, the one in ring 0 does what an interpreter may not know: it compares and exchanges 16
bytes, handles an exception and loads CR3.
"""

import struct
import time
from dataclasses import replace

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import DescriptorTable, VcpuState
from pageferry.kvm.trial import DATA_GPA, PROGRAM_GPA, run_trial, trial_guest, trial_state

_ROUNDS = 100_000
_SLOWER_AT_MOST = 5
_NOISE_S = 0.005
_GDT_GPA, _IDT_GPA, _HANDLER_GPA = PROGRAM_GPA + 0x1000, PROGRAM_GPA + 0x2000, PROGRAM_GPA + 0x3000
_CODE, _DATA = 0x10, 0x18
_BREAKPOINT = 3

# mov ecx, _ROUNDS; 1: dec ecx; jnz 1b
_LOOP = b"\xb9" + struct.pack("<I", _ROUNDS) + b"\xff\xc9\x75\xfc"
# lock cmpxchg16b [DATA_GPA]; int3; mov rax, cr3; mov cr3, rax
_PRIVILEGED = b"\xf0\x48\x0f\xc7\x0c\x25" + struct.pack("<I", DATA_GPA) + b"\xcc\x0f\x20\xd8\x0f\x22\xd8"
_IRETQ = b"\x48\xcf"


def expect_ring_0() -> str:
    """Run the two guests; return what was seen.

    Raises:
        UnsupportedError: ring 0 does not run natively here, and says what was seen; or there is no KVM to be used.
    """
    try:
        in_ring_3_s = _cost_s(_LOOP, trial_state())
        in_ring_0_s = _cost_s(_PRIVILEGED + _LOOP, _ring_0_state())
    except UnsupportedError:  # there is no KVM to ask
        raise
    except VmError as error:
        raise _refusal(str(error)) from error
    if in_ring_0_s > _SLOWER_AT_MOST * in_ring_3_s + _NOISE_S:
        raise _refusal(f"a loop takes {in_ring_0_s * 1000:.1f} ms there, and {in_ring_3_s * 1000:.1f} ms in ring 3")
    return f"a loop takes {in_ring_0_s * 1000:.1f} ms in ring 0, and {in_ring_3_s * 1000:.1f} ms in ring 3"


def _refusal(what: str) -> UnsupportedError:
    return UnsupportedError(
        "kvm-ring0",
        f"KVM does not run a guest's ring 0 natively here: {what}",
        hint="use --accel soft for an operating system",
    )


def _cost_s(program: bytes, state: VcpuState) -> float:
    with trial_guest(state) as vm:
        vm.memory.write(_GDT_GPA, struct.pack("<4Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF))
        vm.memory.write(_IDT_GPA + 16 * _BREAKPOINT, _interrupt_gate(_HANDLER_GPA))
        vm.memory.write(_HANDLER_GPA, _IRETQ)
        began_s = time.process_time()
        run_trial(vm, program)
        return time.process_time() - began_s


def _interrupt_gate(gva: int) -> bytes:
    # Offset 15..0, selector, IST 0, present interrupt gate of ring 0, offset 31..16 and 63..32.
    return struct.pack("<HHBBHII", gva & 0xFFFF, _CODE, 0, 0x8E, gva >> 16 & 0xFFFF, gva >> 32, 0)


def _ring_0_state() -> VcpuState:
    state = trial_state()
    data = replace(state.ss, selector=_DATA, attributes=0xC93)
    return replace(
        state,
        rflags=2,
        cs=replace(state.cs, selector=_CODE, attributes=0xA9B),
        ss=data,
        ds=data,
        es=data,
        gdtr=DescriptorTable(base=_GDT_GPA, limit=0x1F),
        idtr=DescriptorTable(base=_IDT_GPA, limit=0xFFF),
    )
