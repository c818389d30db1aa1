"""Checks of the software machine as an operating system's CPU: what a kernel relies on and no ring-3 guest can see."""

import struct
from dataclasses import replace

from pageferry.core.state import MachineState
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.guests.abi import PAGE_TABLES_GPA, PROGRAM_BASE, entry_state, page_tables
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


# Code is written by the block that goes on to it, by the program elsewhere, by a device, and by another vCPU.
_WRITES_ITS_OWN = bytes.fromhex(
    "bb04000000 bf0000b0fe be00004000"  # mov ebx, 4; mov edi, DMA; mov esi, FUNCTION
    "897708 c7471008000000"  # mov [rdi+target], esi; mov dword [rdi+length], 8
    "c7472400c30000 b9b8000000"  # mov dword [rdi+pattern+4], 0xc300; mov ecx, 0xb8
    "891d01000000"  # again: mov [rip+1], ebx: what the next one loads
    "b800000000"  # mov eax, 0
    "39d8 7533"  # cmp eax, ebx; jne wrong
    "c606b8 895e01 c64605c3"  # mov eax, ebx; ret, to [rsi]
    "ffd6 39d8 7523"  # call rsi; cmp eax, ebx; jne wrong
    "ffcb 75dd"  # dec ebx; jne again
    "bb04000000"  # mov ebx, 4
    "88dd 894f20 c7472801000000"  # next: mov ch, bl; mov [rdi+pattern], ecx; mov dword [rdi+command], FILL
    "ffd6 39d8 7508"  # call rsi; cmp eax, ebx; jne wrong
    "ffcb 75ea"  # dec ebx; jne next
    "31c0 e7f4"  # xor eax, eax; out exit
    "b801000000 e7f4"  # wrong: mov eax, 1; out exit
)
_WRITES_ANOTHERS = bytes.fromhex(
    "bb04000000 bf00004000 ba00005000"  # mov ebx, 4; mov edi, FUNCTION; mov edx, TURN
    "85f6 7519"  # test esi, esi; jne runs
    "895f01 c607b8 c64705c3"  # writes: mov eax, ebx; ret, to [rdi]
    "891a 395a04 75fb"  # mov [rdx], ebx; cmp [rdx+4], ebx; jne .
    "ffcb 75eb"  # dec ebx; jne writes
    "31c0 e7f4"  # xor eax, eax; out exit
    "391a 75fc"  # runs: cmp [rdx], ebx; jne .
    "ffd7 39d8 7509"  # call rdi; cmp eax, ebx; jne wrong
    "895a04 ffcb 75ef ebfe"  # mov [rdx+4], ebx; dec ebx; jne runs; jmp .
    "b801000000 e7f4"  # wrong: mov eax, 1; out exit
)


def what_is_written_is_what_runs(lab: Lab) -> None:
    """Code that the program itself, a device or another vCPU overwrites is what runs from then on."""
    for what, program, cpus in (
        ("its own code, or a device's", _WRITES_ITS_OWN, 1),
        ("another vCPU's code", _WRITES_ANOTHERS, 2),
    ):
        vm = lab.make_vm(VmConfig(memory_bytes=_MEMORY_BYTES, cpus=cpus))
        try:
            vm.memory.write(PAGE_TABLES_GPA, page_tables(4 << 30))
            vm.memory.write(PROGRAM_BASE, program)
            states = tuple(entry_state(PROGRAM_BASE, index) for index in range(cpus))
            vm.load_state(MachineState(vcpus=states, devices=vm.save_state().devices))
            vm.resume()
            vm.wait(_PATIENCE_S)
            end = vm.end
            require(end is not None and end.exit_code == 0, f"what ran was not {what}, which was written ({end})")
        finally:
            vm.close()


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


CHECKS: tuple[Check, ...] = (
    check_of(None, translations_follow_the_guest),
    check_of(None, what_is_written_is_what_runs),
)
