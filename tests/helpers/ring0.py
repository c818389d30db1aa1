"""Small programs in ring 0, in assembly, with handlers that log what was delivered to them.

A program runs at BASE on a PC with an identity map that user mode may use. The prelude gives it a GDT, a TSS and an
IDT. Each exception and interrupt appends a record to the log and goes on at the address in ``resume`` in ring 0, or,
where that is 0, where it came from. ``TRY`` brackets what may fault.
"""

import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from pageferry.core.state import MachineState
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.guests.entry import flat_gdt, long_mode_state
from pageferry.guests.page_tables import identity_map
from pageferry.hypervisor.domain import Domain

MiB = 1 << 20
BASE, LOG, GDT, TABLES = 0x10_0000, 0x20_0000, 0x6000, 0x8000
USER_STACK, HANDLER_STACK, IST_STACK, STACK = 0x30_0000, 0x31_0000, 0x32_0000, 0x33_0000
HOLE = 0x7_0000_0000  # no gva is mapped from here on

PRELUDE = f"""
    .set LOG, {LOG}
    .set HOLE, {HOLE}
    .set USER_STACK, {USER_STACK}
    .set HANDLER_STACK, {HANDLER_STACK}
    .set STACK, {STACK}
    .set IST_STACK, {IST_STACK}
    .macro TRY instruction:vararg
        movq $8f, resume(%rip)
        movq %rsp, resume_rsp(%rip)
        \\instruction
        8: movq $0, resume(%rip)
    .endm
    .macro EXIT code
        movl $\\code, %eax
        outl %eax, $0xf4
    .endm
    .macro TO_USER target
        pushq $0x2b; pushq $USER_STACK; pushq user_flags(%rip); pushq $0x33; pushq $\\target; iretq
    .endm
    .macro GATE vector, handler, type, ist
        movq $\\handler, %rax
        movw %ax, idt + 16*\\vector(%rip)
        movw $0x10, idt + 16*\\vector + 2(%rip)
        movb $\\ist, idt + 16*\\vector + 4(%rip)
        movb $\\type, idt + 16*\\vector + 5(%rip)
        shrq $16, %rax
        movw %ax, idt + 16*\\vector + 6(%rip)
        shrq $16, %rax
        movl %eax, idt + 16*\\vector + 8(%rip)
    .endm
    .code64
    .globl _start
    _start:
        movq $STACK, %rsp
        lgdt gdt_pointer(%rip)
        lidt idt_pointer(%rip)
        movq $tss, %rax
        movw %ax, gdt_tss + 2(%rip)
        shrq $16, %rax
        movb %al, gdt_tss + 4(%rip)
        movb %ah, gdt_tss + 7(%rip)
        movw $0x38, %ax
        ltr %ax
        xorl %ecx, %ecx
        movq $stubs, %rdx
    7:  movq %rdx, %rax
        movq %rcx, %rdi
        shlq $4, %rdi
        addq $idt, %rdi
        movw %ax, (%rdi)
        movw $0x10, 2(%rdi)
        movw $0x8e00, 4(%rdi)
        shrq $16, %rax
        movw %ax, 6(%rdi)
        addq $16, %rdx
        incq %rcx
        cmpq $256, %rcx
        jne 7b
        movq $LOG, log_at(%rip)
        call program
        EXIT 0

    handle:                       # vector, error code, frame
        pushq %rax
        pushq %rdi
        movq log_at(%rip), %rdi
        .irp at, 0, 8, 16, 24, 32, 40, 48
            movq 16 + \\at(%rsp), %rax
            movq %rax, \\at(%rdi)
        .endr
        movq %cr2, %rax
        movq %rax, 56(%rdi)
        addq $64, %rdi
        movq %rdi, log_at(%rip)
        cmpq $0x20, 16(%rsp)      # an interrupt: end it at the first PIC
        jb 1f
        movb $0x20, %al
        outb %al, $0x20
    1:  cmpq $0, resume(%rip)
        je 2f
        movq resume(%rip), %rax
        movq %rax, 32(%rsp)
        movq $0x10, 40(%rsp)
        movq $2, 48(%rsp)
        movq resume_rsp(%rip), %rax
        movq %rax, 56(%rsp)
        movq $0x18, 64(%rsp)
    2:  popq %rdi
        popq %rax
        addq $16, %rsp
        iretq

    .balign 16
    stubs:
        .set vector, 0
        .rept 256
        .balign 16
        .if vector != 8 && (vector < 10 || vector > 14) && vector != 17
        pushq $0
        .endif
        .byte 0x68; .long vector; jmp handle
        .set vector, vector + 1
        .endr

    .balign 16
    gdt:     .quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff
             .quad 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
    gdt_tss: .quad 0x0000890000000000 + tss_end - tss - 1, 0
    gdt_pointer: .word gdt_pointer - gdt - 1; .quad gdt
    idt_pointer: .word 4095; .quad idt
    log_at:      .quad 0
    resume:      .quad 0
    resume_rsp:  .quad 0
    user_flags:  .quad 2
    .balign 16
    tss:     .long 0; .quad HANDLER_STACK; .quad 0, 0, 0, IST_STACK
             .org tss + 0x66
             .word 0x68
             .fill 64, 1, 0xff     # the I/O bitmap: ports to 0x1ff
             .byte 0xff
    tss_end:
    .balign 4096
    idt:     .fill 4096
"""


def assemble(folder: Path, text: str) -> tuple[bytes, dict[str, int]]:
    """Return the machine code of a program at BASE, and the addresses of its symbols."""
    if shutil.which("gcc") is None:
        pytest.skip("programs in assembly need gcc (Debian: apt-get install gcc)")
    source, image, flat = folder / "program.s", folder / "program.elf", folder / "program.bin"
    source.write_text(text)
    options = ("-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-N")
    link = ("-Wl,--no-warn-rwx-segments", f"-Wl,-Ttext={BASE:#x}", "-Wl,-Tdata=0x180000")
    subprocess.run(["gcc", *options, *link, "-o", image, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", image, flat], check=True)
    listed = subprocess.run(["nm", "--defined-only", image], check=True, capture_output=True, text=True)
    return flat.read_bytes(), {name: int(at, 16) for at, _, name in map(str.split, listed.stdout.splitlines())}


class Logged(NamedTuple):
    """What a handler was given."""

    vector: int
    error_code: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    cr2: int


class Ring0:
    """A program on a machine of its own; ``symbols`` are its addresses."""

    def __init__(self, folder: Path, program: str, *, paging_mode: str = "hap") -> None:
        code, self.symbols = assemble(folder, f"{PRELUDE}\n.text\nprogram:\n{program}\n")
        self.vm = machine(paging_mode)
        for gpa, data in ((BASE, code), (GDT, flat_gdt(long_mode=True))):
            self.vm.memory.write(gpa, data)
        self.vm.memory.write(TABLES, identity_map(TABLES, 1, user=True))
        state = long_mode_state(rip=self.symbols["_start"], rsi=0, cr3=TABLES, gdt_gpa=GDT)
        self.vm.load_state(MachineState(vcpus=(state,), devices=self.vm.save_state().devices))

    def log(self) -> list[Logged]:
        """Return what the handlers have logged so far."""
        end = self.vm.memory.read_u64(self.symbols["log_at"])
        data = self.vm.memory.read(LOG, end - LOG)
        return [Logged(*record) for record in struct.iter_unpack("<8Q", data)]

    def word(self, symbol: str) -> int:
        """Return the u64 at a symbol."""
        return self.vm.memory.read_u64(self.symbols[symbol])


def machine(paging_mode: str = "hap") -> Domain:
    """Return a small PC in software."""
    return Domain(VmConfig(memory_bytes=16 * MiB, machine=MachineModel.PC), paging_mode=paging_mode)
