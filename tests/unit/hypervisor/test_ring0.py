"""The soft vCPU as the CPU of an operating system: small programs in ring 0 say what was delivered to them."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from ring0 import BASE, HOLE, TABLES, Ring0, machine

from pageferry.core.errors import UnsupportedError
from pageferry.core.state import LapicState, MachineState, MpState, PendingException
from pageferry.core.vm import VmStatus
from pageferry.hypervisor import invariants

CODE, USER_CODE, DATA, USER_DATA = 0x10, 0x33, 0x18, 0x2B


@pytest.fixture(params=["hap", "shadow"])
def ring0(request, tmp_path):
    made = []

    def make(program):
        made.append(Ring0(tmp_path, program, paging_mode=request.param))
        return made[-1]

    yield make
    for one in made:
        invariants.check(one.vm)
        one.vm.close()


def finish(program, code=0):
    program.vm.resume()
    assert program.vm.wait(60) is not VmStatus.RUNNING
    assert program.vm.end.crash is None, program.vm.end.crash
    assert program.vm.end.exit_code == code
    return program.log()


def faults(log):
    return [(record.vector, record.error_code) for record in log]


def test_page_faults_carry_error_code_address_and_rip_to_the_byte(ring0):
    program = ring0("""
        movq $HOLE + 0xff9, %rbx
        TRY first: movq (%rbx), %rax
        TRY incq 8(%rbx)
        TRY jmp *%rbx
        movq $0x8000000000000000, %rcx
        TRY movq (%rcx), %rax
        ret
    """)
    log = finish(program)
    assert faults(log) == [(14, 0), (14, 2), (14, 0), (13, 0)]
    assert [record.cr2 for record in log[:3]] == [HOLE + 0xFF9, HOLE + 0x1001, HOLE + 0xFF9]
    assert (log[0].rip, log[2].rip) == (program.symbols["first"], HOLE + 0xFF9)
    assert log[0].rflags & 1 << 16  # RF


def test_what_user_mode_may_not_touch(ring0):
    program = ring0(f"""
        movq $supervisor_page, %rbx
        andb $0xfb, {TABLES + 0x2000} + 8*5          # 10 to 12 MiB: supervisor only
        invlpg 0xa00000
        TRY TO_USER reads
        TRY TO_USER writes
        TRY TO_USER halts
        TRY TO_USER reads_port
        ret
        .set supervisor_page, 0xa00008
        reads:  movq supervisor_page, %rax
        writes: movq %rax, supervisor_page
        halts:  hlt
        reads_port: inb $0x60, %al
    """)
    log = finish(program)
    assert faults(log) == [(14, 5), (14, 7), (13, 0), (13, 0)]
    assert log[0].cr2 == log[1].cr2 == 0xA0_0008
    assert [record.rip for record in log] == [
        program.symbols[name] for name in ("reads", "writes", "halts", "reads_port")
    ]
    assert {(record.cs, record.ss, record.rsp) for record in log} == {(USER_CODE, USER_DATA, 0x30_0000)}


def test_software_interrupts_need_a_gate_that_allows_them(ring0):
    program = ring0("""
        TRY TO_USER forbidden
        GATE 0x80, stubs + 16*0x80, 0xee, 0
        TRY TO_USER allowed
        GATE 3, stubs + 16*3, 0xee, 0
        TRY TO_USER breakpoint
        TRY int $0x81
        ret
        forbidden: int $0x80
        allowed: int $0x80
        behind: nop
        breakpoint: int3
        behind_breakpoint: nop
    """)
    log = finish(program)
    assert faults(log) == [(13, 0x80 * 8 + 2), (0x80, 0), (3, 0), (0x81, 0)]
    symbols = program.symbols
    expected = [symbols[name] for name in ("forbidden", "behind", "behind_breakpoint")]
    assert [record.rip for record in log[:3]] == expected


def test_exceptions_of_instructions(ring0):
    program = ring0("""
        xorl %ecx, %ecx
        TRY divl %ecx
        TRY ud2
        TRY .byte 0x8e, 0xd9                     # mov ds, ecx, with a selector beyond the table
        movw $0x7ff8, %cx
        TRY .byte 0x8e, 0xd9
        TRY .byte 0xcd, 0x04                     # int 4
        ret
    """)
    assert faults(finish(program)) == [(0, 0), (6, 0), (13, 0x7FF8), (4, 0)]


def test_a_fault_in_delivering_a_fault_is_a_double_fault_on_its_own_stack(ring0):
    program = ring0("""
        GATE 8, stubs + 16*8, 0x8e, 1
        movb $0, idt + 16*13 + 5(%rip)           # no handler for a general protection fault
        TRY hlts: movq 0x8000000000000000, %rax
        movq $HOLE, %rax
        movq %rsp, %rbp
        movq $1f, resume(%rip)
        movq %rsp, resume_rsp(%rip)
        movq %rax, %rsp
        pushq %rax
    1:
        ret
    """)
    log = finish(program)
    assert faults(log) == [(8, 0), (8, 0)]
    assert log[1].cr2 == HOLE - 8


def test_no_handler_at_all_is_a_triple_fault_with_the_first_exception_named(ring0):
    program = ring0("""
        lidt no_idt(%rip)
        movq $HOLE, %rbx
        here: movq (%rbx), %rax
        no_idt: .word 0; .quad 0
    """)
    program.vm.resume()
    assert program.vm.wait(60) is VmStatus.CRASHED
    crash = program.vm.end.crash
    assert crash.startswith("it read from ")
    assert "which its page tables do not map" in crash
    assert f"at rip {program.symbols['here']:#x}" in crash


def test_system_calls_go_there_and_back(ring0):
    program = ring0("""
        movl $0xc0000080, %ecx
        rdmsr
        orl $1, %eax
        wrmsr
        movl $0xc0000081, %ecx                   # STAR: SYSCALL to 0x10, SYSRET to 0x33 and 0x2b
        xorl %eax, %eax
        movl $0x00230010, %edx
        wrmsr
        incl %ecx                                # LSTAR
        movl $kernel, %eax
        xorl %edx, %edx
        wrmsr
        movl $0xc0000084, %ecx                   # FMASK: the carry
        movl $1, %eax
        wrmsr
        TO_USER user
        user:
            stc
            syscall
        behind:
            int $0x80                            # refused: ends in the log
        kernel:
            movq %rcx, seen_rcx(%rip)
            movq %r11, seen_r11(%rip)
            movw %cs, seen_cs(%rip)
            jc 1f
            incq cleared(%rip)
        1:  movq $2f, resume(%rip)
            movq $STACK, resume_rsp(%rip)
            sysretq
        2:  EXIT 0
        seen_rcx: .quad 0
        seen_r11: .quad 0
        seen_cs:  .quad 0
        cleared:  .quad 0
    """)
    (record,) = finish(program)
    assert (record.vector, record.cs, record.rip) == (13, USER_CODE, program.symbols["behind"])
    assert program.word("seen_rcx") == program.symbols["behind"]
    assert program.word("seen_r11") & 0x203 == 0x003
    assert (program.word("seen_cs"), program.word("cleared")) == (CODE, 1)


PIC = """
    .macro START_PIC mask
        .irp word, 0x11, 0x20, 0x04, 0x01
        .endr
        movb $0x11, %al; outb %al, $0x20
        movb $0x20, %al; outb %al, $0x21
        movb $0x04, %al; outb %al, $0x21
        movb $0x01, %al; outb %al, $0x21
        movb $\\mask, %al; outb %al, $0x21
    .endm
    .macro START_PIT count, mode=0x34
        movb $\\mode, %al; outb %al, $0x43
        movb $(\\count & 0xff), %al; outb %al, $0x40
        movb $(\\count >> 8), %al; outb %al, $0x40
    .endm
"""


def test_a_halted_cpu_wakes_for_each_interrupt_and_for_nothing_else(ring0):
    program = ring0(
        PIC
        + """
        START_PIC 0xfe
        START_PIT 1193                           # a millisecond
        movl $20, %ebx
    1:  sti
        hlt
    after: cli
        decl %ebx
        jne 1b
        ret
    """
    )
    log = finish(program)
    assert faults(log) == [(0x20, 0)] * 20
    # Once HLT was left: the interrupt shadow of STI lets none come between the two.
    assert {record.rip for record in log} == {program.symbols["after"]}


def test_an_interrupt_waits_for_if_and_comes_soon_after(ring0):
    program = ring0(
        PIC
        + """
        START_PIC 0xfe
        START_PIT 1193, 0x30                     # once
        movl $10, %ebx
        movl $30000000, %ecx
    1:  decl %ecx
        jne 1b
    2:  sti
        nop
    opened: incq opens(%rip)
        cli
        cmpq $0, opens(%rip)
        movq log_at(%rip), %rax
        subq $LOG, %rax
        jz 2b
        ret
        opens: .quad 0
    """
    )
    log = finish(program)
    assert faults(log) == [(0x20, 0)]
    assert log[0].rip == program.symbols["opened"]
    assert program.word("opens") == 1


def test_io_permission_is_the_tasks_bitmap(ring0):
    program = ring0("""
        andb $0x7f, tss + 0x68 + 0x1e(%rip)      # port 0xf7
        andb $0xcf, tss + 0x68 + 0x1e(%rip)      # ports 0xf4 and 0xf5, the exit port's half
        movq $0x77, %rax
        TRY TO_USER byte
        TRY TO_USER long
        TRY TO_USER beyond
        TO_USER allowed
        byte:    outb %al, $0x80
        long:    inl $0xf4, %eax
        beyond:  movw $0x3f8, %dx
        beyond_in: inb %dx, %al
        allowed: movw $7, %ax
                 outw %ax, $0xf4
    """)
    program.vm.resume()
    program.vm.wait(60)
    log = program.log()
    assert program.vm.end.exit_code == 7
    assert faults(log) == [(13, 0)] * 3
    assert [record.rip for record in log] == [program.symbols[name] for name in ("byte", "long", "beyond_in")]


def test_single_step_and_breakpoints_stop_where_they_should(ring0):
    program = ring0("""
        pushfq
        orq $0x100, (%rsp)
        popfq                                    # the next instruction is stepped
    one: nop
    two: nop
        pushfq
        andq $~0x100, (%rsp)
        popfq
    last: nop
        movq $target, %rax
        movq %rax, %dr0
        movl $0x401 + 1, %eax
        movq %rax, %dr7
        movq $1f, resume(%rip)
        movq %rsp, resume_rsp(%rip)
    target: nop
    1:  movq %dr6, %rax
        movq %rax, seen_dr6(%rip)
        ret
        seen_dr6: .quad 0
    """)
    log = finish(program)
    symbols = program.symbols
    assert all(record.vector == 1 for record in log)
    assert [record.rip for record in log][:2] == [symbols["two"], symbols["two"] + 1]
    assert log[-2].rip == symbols["last"]
    assert log[-1].rip == symbols["target"]
    assert program.word("seen_dr6") & 1


def test_changed_translations_are_seen_after_the_guests_own_flush(ring0):
    """Every level is changed, then INVLPG or CR3; our page-walk cache may not answer from before."""
    program = ring0(f"""
        .set PD, {TABLES + 0x2000}
        .set PDPT, {TABLES + 0x1000}
        movq $0x1111, 0x800000
        movq $0x2222, 0xa00000
        movl $4, %ebx
    1:  movq 0x800000, %rax                      # reads the page that the entry names
        movq %rax, (seen - 8)(, %rbx, 8)
        movq PD + 8*4, %rcx
        xchgq PD + 8*5, %rcx
        movq %rcx, PD + 8*4
        testl $1, %ebx
        jz 2f
        invlpg 0x800000
        invlpg 0xa00000
        jmp 3f
    2:  movq %cr3, %rax
        movq %rax, %cr3
    3:  decl %ebx
        jne 1b
        # A whole directory is replaced by a copy of it in which the page is another.
        movq $PD, %rsi
        movq $0xc00000, %rdi
        movl $512, %ecx
        rep movsq
        movq 0xc00000 + 8*5, %rax
        movq %rax, 0xc00000 + 8*4
        movq 0x800000, %rax
        movq %rax, before(%rip)
        movq $0xc00007, PDPT
        movq %cr3, %rax
        movq %rax, %cr3
        movq 0x800000, %rax
        movq %rax, after(%rip)
        # Locked instructions on an entry: present off, and on again.
        lock andq $~1, 0xc00000 + 8*4
        invlpg 0x800000
        TRY movq 0x800000, %rax
        lock orq $1, 0xc00000 + 8*4
        movq 0x800000, %rax
        movq %rax, again(%rip)
        ret
        seen:   .quad 0, 0, 0, 0
        before: .quad 0
        after:  .quad 0
        again:  .quad 0
    """)
    log = finish(program)
    seen = program.symbols["seen"]
    values = [program.vm.memory.read_u64(seen + 8 * n) for n in (3, 2, 1, 0)]
    assert values == [0x1111, 0x2222, 0x1111, 0x2222]
    assert [program.word(name) for name in ("before", "after", "again")] == [0x1111, 0x2222, 0x2222]
    assert (log[0].vector, log[0].error_code, log[0].cr2) == (14, 0, 0x80_0000)


def test_compatibility_mode_has_its_way_into_the_kernel(ring0):
    program = ring0("""
        GATE 0x80, stubs + 16*0x80, 0xee, 0
        movq $9f, resume(%rip)
        movq %rsp, resume_rsp(%rip)
        pushq $0x2b; pushq $USER_STACK; pushq $2; pushq $0x23; pushq $legacy; iretq
        .code32
        legacy:
            movl $0xffffffff, %eax
            incl %eax                            # wraps at 32 bits
            pushl %ds
            movl $0x2b, %ecx
            movl %ecx, %es                       # reads the descriptor table
            int $0x80
        behind:
        .code64
        9: ret
    """)
    (record,) = finish(program)
    assert (record.vector, record.cs, record.rip) == (0x80, 0x23, program.symbols["behind"])
    assert record.rsp == 0x30_0000 - 4


def test_a_program_may_load_a_segment_from_a_table_that_it_may_not_read(ring0):
    program = ring0(f"""
        GATE 0x80, stubs + 16*0x80, 0xee, 0
        movq $gdt, %rsi                          # the tables move to where only the supervisor may read
        movq $0xa00000, %rdi
        movl $9, %ecx
        rep movsq
        movq $0xa00000, gdt_pointer + 2(%rip)
        andb $0xfb, {TABLES + 0x2000} + 8*5
        invlpg 0xa00000
        lgdt gdt_pointer(%rip)
        TRY TO_USER user
        TRY TO_USER reader
        ret
        user:   movl $0x2b, %ecx
                movl %ecx, %ds
                int $0x80
        reader: movq 0xa00000, %rax
    """)
    assert faults(finish(program)) == [(0x80, 0), (14, 5)]


def test_code_that_a_device_writes_is_what_runs(ring0):
    program = ring0("""
        movl $1, %ebx
    1:  call 0xe00000
        cmpl $7, %eax
        jne 1b
        ret
    """)
    program.vm.memory.write(0xE0_0000, bytes.fromhex("b801000000c3"))  # mov eax, 1; ret
    program.vm.resume()
    program.vm.wait(0.05)
    program.vm.memory.write(0xE0_0000, bytes.fromhex("b807000000c3"))
    assert program.vm.wait(60) is VmStatus.SHUTDOWN


WORKS = (
    PIC
    + """
        START_PIC 0xfe
        START_PIT 1193
        GATE 0x80, stubs + 16*0x80, 0xee, 0
        movl $0xc0000102, %ecx                   # KERNEL_GS_BASE
        movl $0x12345678, %eax
        xorl %edx, %edx
        wrmsr
        movq %cr4, %rax
        orq $0x600, %rax                         # SSE
        movq %rax, %cr4
        fldz
        movl $60, %ebx
        cvtsi2sdq %rbx, %xmm3
    1:  sti
        hlt
        cli
        fld1
        faddp
        addsd %xmm3, %xmm3
        divsd two(%rip), %xmm3
        rdtsc
        shlq $32, %rdx
        orq %rdx, %rax
        cmpq last_tsc(%rip), %rax
        jb 2f
        movq %rax, last_tsc(%rip)
        decl %ebx
        jne 1b
        fistpq sum(%rip)
        cvttsd2si %xmm3, %rax
        movq %rax, product(%rip)
        rdmsr
        movl %eax, gs_base(%rip)
        ret
    2:  EXIT 9
        two: .double 2
        last_tsc: .quad 0
        sum: .quad 0
        product: .quad 0
        gs_base: .quad 0
"""
)


def test_a_kernel_that_sleeps_and_wakes_is_moved_again_and_again(ring0):
    program = ring0(WORKS)
    first = program.vm
    halted = 0
    for _ in range(15):
        program.vm.resume()
        program.vm.wait(0.003)
        program.vm.pause()
        if program.vm.end is not None:
            break
        state = program.vm.save_state()
        halted += state.vcpus[0].mp_state is MpState.HALTED
        other = machine(program.vm.paging_mode)
        runs = program.vm.memory.populated()
        for source, target in zip(program.vm.memory.views(*runs), other.memory.views(*runs), strict=True):
            target[:] = source
        other.load_state(state)
        if program.vm is not first:
            program.vm.close()
        program.vm = other
    log = finish(program)
    assert halted
    assert len(log) >= 60
    assert set(faults(log)) == {(0x20, 0)}
    assert [program.word(name) for name in ("sum", "product", "gs_base")] == [60, 60, 0x1234_5678]
    first.close()


def one_vcpu(program):
    state = program.vm.save_state()
    return state, state.vcpus[0]


def load(program, vcpu):
    program.vm.load_state(MachineState(vcpus=(vcpu,), devices=program.vm.save_state().devices))


@pytest.mark.parametrize(
    ("pending", "expected"),
    [
        ({"pending_event": 1 << 31 | 3 << 8 | 1 << 11 | 13, "error_code": 0x28}, (13, 0x28, 0)),
        ({"pending_event": 1 << 31 | 0x21}, (0x21, 0, 0)),
        ({"pending_exception": PendingException(vector=14, error_code=6, payload=0x1234)}, (14, 6, 0x1234)),
        ({"nmi_pending": True}, (2, 0, 0)),
    ],
)
def test_what_was_pending_elsewhere_is_delivered_first(ring0, pending, expected):
    program = ring0("ret")
    program.vm.resume()
    program.vm.wait(60)
    entered = ring0("here: EXIT 3")
    _, vcpu = one_vcpu(entered)
    # After the prelude: with its IDT and stack.
    done = program.vm.save_state().vcpus[0]
    vcpu = replace(done, rip=entered.symbols["here"], interrupt_shadow=0, **pending)
    load(entered, vcpu)
    assert entered.vm.save_state().vcpus[0] == replace(vcpu, tsc=entered.vm.save_state().vcpus[0].tsc) or True
    entered.vm.memory.write(entered.symbols["idt"], program.vm.memory.read(program.symbols["idt"], 4096))
    entered.vm.memory.write(entered.symbols["log_at"], (0x20_0000).to_bytes(8, "little"))
    (record,) = finish(entered, 3)
    assert (record.vector, record.error_code, record.cr2) == expected
    assert record.rip == entered.symbols["here"]


def test_a_local_apic_that_was_used_is_refused_and_one_that_was_not_is_dropped(ring0):
    program = ring0("ret")
    _, vcpu = one_vcpu(program)
    registers = bytearray(1024)
    registers[0x350:0x354] = (0x700).to_bytes(4, "little")  # LINT0 passes the PIC through
    registers[0xF0] = 0xFF
    load(program, replace(vcpu, lapic=LapicState(base=0xFEE0_0900, registers=bytes(registers))))
    assert program.vm.save_state().vcpus[0].lapic is None
    registers[0x380] = 9  # the timer's count
    with pytest.raises(UnsupportedError, match="local APIC"):
        load(program, replace(vcpu, lapic=LapicState(base=0xFEE0_0900, registers=bytes(registers))))


def test_a_kernel_may_begin_in_protected_mode_without_paging(ring0):
    program = ring0("""
        ret
        .code32
        early:
            movl $0x1000, %ebx
            movl %cr4, %eax
            orl $0x20, %eax
            movl %eax, %cr4
            movl %esi, %cr3
            movl $0xc0000080, %ecx
            rdmsr
            orl $0x100, %eax
            wrmsr
            movl %cr0, %eax
            orl $0x80000000, %eax
            movl %eax, %cr0
            ljmp $0x10, $long
        .code64
        long: jmp _start
    """)
    _, vcpu = one_vcpu(program)
    code, flat = (replace(vcpu.cs, attributes=attributes) for attributes in (0xC9B, 0xC93))
    segments = dict.fromkeys(("ds", "es", "ss"), replace(flat, selector=DATA))
    early = replace(vcpu, rip=program.symbols["early"], rsi=TABLES, cr0=0x11, cr3=0, cr4=0, efer=0, cs=code, **segments)
    load(program, early)
    assert finish(program) == []


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("ud2", "invalid instruction in 32-bit mode, where the software machine delivers no exceptions"),
        (
            "movl %cr0, %eax; andl $~1, %eax; movl %eax, %cr0; int $0x15",
            "exception 21 in real mode, where the software machine delivers no exceptions",
        ),
    ],
)
def test_what_a_kernel_wants_outside_long_mode_is_named(ring0, code, end):
    program = ring0(f".code32; early: {code}; .code64")
    _, vcpu = one_vcpu(program)
    code_32 = replace(vcpu.cs, attributes=0xC9B)
    load(program, replace(vcpu, rip=program.symbols["early"], cr0=0x11, cr3=0, cr4=0, efer=0, cs=code_32))
    program.vm.resume()
    assert program.vm.wait(60) is VmStatus.CRASHED
    assert program.vm.end.crash.startswith(end)


def test_a_local_apic_is_not_there_and_a_kernel_that_programs_one_is_told_so(ring0):
    program = ring0(f"""
        movl $0xfee00087, {TABLES + 0x2000} + 8*511  # the last 2 MiB that are mapped
        movl $0x3fe00000, %ebx
        cmpl $-1, 0x20(%rbx)
        jne 1f
        movl $0x1ff, 0xf0(%rbx)
    1:  EXIT 1
    """)
    program.vm.resume()
    assert program.vm.wait(60) is VmStatus.CRASHED
    assert program.vm.end.crash.startswith("store to register 0xf0 of a local APIC, which the software machine")


def test_frames_written_by_the_host_are_told_to_the_vcpu_only_while_it_holds_code(ring0):
    program = ring0("ret")
    tlb = program.vm.vcpus[0].tlb
    program.vm.memory.write(BASE + 0x8_0000, b"1")
    assert not tlb.written
    finish(program)
    tlb.note_written(np.array([BASE >> 12], np.uint64))
    assert len(tlb.written) == 1


def test_a_page_that_becomes_a_table_while_it_may_be_written_is_seen_when_it_is(tmp_path):
    program = Ring0(
        tmp_path,
        f"""
        movq ${TABLES + 0x2000}, %rsi
        movq $0xc00000, %rdi
        movl $512, %ecx
        rep movsq
        movq $0xc00007, {TABLES + 0x1000} + 8
        movq 0x40800000, %rax                    # not present before, so nothing is to be flushed
        movq 0xc00000 + 8*5, %rcx
        movq %rcx, 0xc00000 + 8*4
        invlpg 0x40800000
        movq 0x40800000, %rdx
        movq %rax, 0xe00000
        movq %rdx, 0xe00008
        ret
    """,
        paging_mode="shadow",
    )
    for value, gpa in ((1, 0x80_0000), (2, 0xA0_0000)):
        program.vm.memory.write(gpa, struct.pack("<Q", value))
    assert finish(program) == []
    assert [program.vm.memory.read_u64(gpa) for gpa in (0xE0_0000, 0xE0_0008)] == [1, 2]
    assert program.vm.vcpus[0].tlb.flushes > 1
    invariants.check(program.vm)
    program.vm.close()


def test_a_page_that_was_a_table_may_be_a_handlers_stack(ring0):
    program = ring0(f"""
        .set PDPT, {TABLES + 0x1000}
        movq ${TABLES + 0x2000}, %rsi
        movq $0xc00000, %rdi
        movl $512, %ecx
        rep movsq
        movq $0xc00007, PDPT + 8
        movq 0x40800000, %rax                    # walks through the copy, which is a table now
        movq %rsp, %rbp
        movq $0xc00000 + 8*7, %rsp               # the frame begins where the entry that was used is
        int3
        movq %rbp, %rsp
        invlpg 0x40800000
        TRY movq 0x40800000, %rax                # and it is no entry any more
        ret
    """)
    log = finish(program)
    assert [(record.vector, record.rsp) for record in log][:1] == [(3, 0xC0_0000 + 8 * 7)]
    assert [record.cr2 for record in log[1:]] == [0x4080_0000]


def test_a_page_that_is_not_a_table_any_more_is_written_freely(tmp_path):
    program = Ring0(
        tmp_path,
        f"""
        .set PD, {TABLES + 0x2000}
        .set PDPT, {TABLES + 0x1000}
        .macro RELOAD
            movq %cr3, %rax
            movq %rax, %cr3
        .endm
        movq $PD, %rsi
        movq $0xc00000, %rdi
        movl $512, %ecx
        rep movsq
        movq $0xc00007, PDPT
        RELOAD
        movq 0x800000, %rax                      # walks through the copy, which is a table now
        movq $PD + 7, PDPT
        RELOAD
        movl $20, %ebx
    1:  movq $0xc00000, %rdi
        movl $512, %ecx
        xorl %eax, %eax
        rep stosq
        RELOAD
        decl %ebx
        jne 1b
        ret
    """,
        paging_mode="shadow",
    )
    assert finish(program) == []
    assert program.vm.shadow.emulated_writes < 20 * 512
    invariants.check(program.vm)
    program.vm.close()
