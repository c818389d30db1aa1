"""Checks of the software machine as an operating system's CPU: what a kernel relies on and no ring-3 guest can see."""

import struct
from dataclasses import replace

from pageferry.core.state import MachineState
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.guests.entry import flat_gdt, long_mode_state
from pageferry.guests.page_tables import identity_map
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.paging import PAGING_MODES
from pageferry.testing.conformance import Check, check_of
from pageferry.testing.lab import Lab, require

_MEMORY_BYTES = 16 << 20
_GDT_GPA, _TABLES_GPA, _CODE_GPA = 0x6000, 0x8000, 0x10_0000
_FIRST_GPA, _SECOND_GPA = 0x80_0000, 0xA0_0000
_ENTRY_GPA = _TABLES_GPA + 0x2000 + 8 * (_FIRST_GPA >> 21)
_PATIENCE_S = 60

# Exchange the entries of two pages, and look through the first again, four times; exit with 1 if it reads as before.
_PROGRAM = bytes.fromhex(
    "bd04000000"  # mov ebp, 4
    "488b06"  # again: mov rax, [rsi]
    "488b4b08 48870b 48894b08"  # mov rcx, [rbx+8]; xchg [rbx], rcx; mov [rbx+8], rcx
    "0f013e"  # invlpg [rsi]
    "483906 7408"  # cmp [rsi], rax; je stale
    "ffcd 75e6"  # dec ebp; jne again
    "31c0 e7f4"  # xor eax, eax; out exit
    "b801000000 e7f4"  # stale: mov eax, 1; out exit
)


def translations_follow_the_guest(lab: Lab) -> None:
    """A kernel changes its page tables and invalidates: from then on it sees the other page, in every paging mode."""
    for mode in PAGING_MODES:
        vm = lab.make_vm(VmConfig(memory_bytes=_MEMORY_BYTES, machine=MachineModel.PC))
        assert isinstance(vm, Domain)
        try:
            vm.set_paging_mode(mode)
            for gpa, data in (
                (_GDT_GPA, flat_gdt(long_mode=True)),
                (_TABLES_GPA, identity_map(_TABLES_GPA, 1, user=False)),
                (_CODE_GPA, _PROGRAM),
                (_FIRST_GPA, struct.pack("<Q", 1)),
                (_SECOND_GPA, struct.pack("<Q", 2)),
            ):
                vm.memory.write(gpa, data)
            state = long_mode_state(rip=_CODE_GPA, rsi=_FIRST_GPA, cr3=_TABLES_GPA, gdt_gpa=_GDT_GPA)
            state = replace(state, rbx=_ENTRY_GPA)
            vm.load_state(MachineState(vcpus=(state,), devices=vm.save_state().devices))
            vm.resume()
            vm.wait(_PATIENCE_S)
            end = vm.end
            require(end is not None and end.exit_code == 0, f"{mode}: a stale translation after INVLPG ({end})")
        finally:
            vm.close()


CHECKS: tuple[Check, ...] = (check_of(None, translations_follow_the_guest),)
