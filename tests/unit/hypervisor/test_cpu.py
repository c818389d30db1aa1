import re
import struct
from dataclasses import replace

import pytest
from at_work import until

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.run import GuestExit, SyncPoint, Wait
from pageferry.core.state import DescriptorTable, MachineState, MpState, Segment
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.devices.dma import DMA_MMIO
from pageferry.guests.abi import PAGE_TABLES_GPA, PROGRAM_BASE, entry_state, page_tables
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.p2m_types import P2MType

MiB = 1 << 20
DATA = 0x300000
TABLES = [(PAGE_TABLES_GPA >> 12) + n for n in range(3)]  # PML4, PDPT, and the PD of the first GiB
EXIT = "e7f4"  # out 0xf4, eax
SYNC = "e7ec"  # out 0xec, eax


@pytest.fixture
def machines():
    made = []

    def make(code="", *, memory_bytes=16 * MiB, **registers):
        vm = Domain(VmConfig(memory_bytes=memory_bytes))
        made.append(vm)
        if code:
            vm.memory.write(PAGE_TABLES_GPA, page_tables(4 << 30))
            vm.memory.write(PROGRAM_BASE, bytes.fromhex(code))
            load(vm, replace(entry_state(PROGRAM_BASE, 0), **registers))
        return vm

    yield make
    for vm in made:
        invariants.check(vm)
        vm.close()


def load(vm, state):
    vm.load_state(MachineState(vcpus=(state,), devices=vm.save_state().devices))


def state_of(vm):
    return vm.save_state().vcpus[0]


def finish(vm):
    vm.resume()
    assert vm.wait(60) is not VmStatus.RUNNING
    return vm.end


def work_on(vm):
    """Let a paused guest run until it has done something, and pause it; return its state."""
    before = state_of(vm)

    def worked():
        vm.resume()
        vm.wait(0.001)  # it runs: this returns when the time is over
        vm.pause()
        assert vm.end is None
        return replace(state_of(vm), tsc=0) != replace(before, tsc=0)

    until(worked, "progress")
    return state_of(vm)


def counted_pauses(vm, check, pauses=50):
    """Pause a running guest at work so many times; check its state each time."""
    for _ in range(pauses):
        check(work_on(vm))


@pytest.mark.parametrize(
    ("code", "crash"),
    [
        ("f4", "HLT, which the guest ABI forbids, at rip 0x100000"),  # ring 3 for real
        ("c6042500000000ffec", "general protection fault at rip 0x100008"),  # IN from port 0, whose bit was just set
        ("31c9f7f1", "divide error at rip 0x100002"),
        ("0f0b", "invalid instruction at rip 0x100000"),
        ("cc", "breakpoint"),
        ("b800000040488700", None),
        ("48b80000000008000000488900", "it wrote to 0x800000000, which its page tables do not map .* at rip 0x10000a"),
        ("48b80000000008000000488b00", "it read from 0x800000000, which its page tables do not map .* at rip 0x10000a"),
        (
            "48b80000000008000000ffe0",
            "it jumped to 0x800000000, which its page tables do not map .* at rip 0x800000000",
        ),
        (
            "48b80000000000800000488900",
            "it wrote to 0x800000000000, which is not a canonical address .* at rip 0x10000a",
        ),
        ("b80000b0feffe0", "instruction fetch from device space, gpa 0xfeb00000"),
        ("9d", None),
    ],
)
def test_what_no_machine_survives_is_one_clear_line(machines, code, crash):
    # After the instruction, if it is survived, the guest exits.
    vm = machines(code + "b807000000" + EXIT)
    end = finish(vm)
    if crash is None:
        assert end.exit_code == 7
    else:
        assert vm.status is VmStatus.CRASHED
        assert "\n" not in end.crash
        assert re.search(crash, end.crash), end.crash


def test_a_crash_carries_the_registers(machines):
    # mov rcx, imm64 (not mapped); mov [rcx], rax
    vm = machines("48b90000000008000000488901", rax=0x77, rsp=0x9FF8)
    crash = finish(vm).crash
    assert "(page fault, error code 0x6)" in crash
    for register in ("rip 0x10000a", "rsp=0x9ff8", "rax=0x77", "cr2=0x800000000", f"cr3={PAGE_TABLES_GPA:#x}"):
        assert register in crash
    assert state_of(vm).cr2 == 0x800000000


def test_an_out_with_an_effect_is_complete_and_nothing_after_it_has_run(machines):
    # cmp eax, 6 (borrows); out sync; inc ecx; setc dl; in eax, sync; out exit
    vm = machines("83f806" + SYNC + "ffc1" + "0f92c2" + "e5ec" + EXIT, rax=5, rcx=0, rdx=0)
    vm.attach_sync(True)
    vm.resume()
    assert vm.wait(60) is VmStatus.PAUSED
    assert vm.sync_value() == 5
    state = state_of(vm)
    assert (state.rip, state.rcx) == (PROGRAM_BASE + 5, 0)
    assert state.rflags & 1  # the comparison's carry, for whatever comes next
    vm.reply_sync(0x12345678)
    assert finish(vm).exit_code == 0x12345678
    state = state_of(vm)
    assert (state.rcx, state.rdx & 0xFF) == (1, 1)  # SETC saw the carry, which INC keeps


@pytest.mark.parametrize("before", range(506, 516))
def test_an_effect_is_exact_wherever_the_emulator_ends_a_block(machines, before):
    # It ends a block after 512 instructions at the latest, and chains blocks that have run after each other.
    # l: inc edx; nop...; out sync; inc ecx; jmp l
    code = "ffc2" + "90" * before + SYNC + "ffc1"
    vm = machines(code + "e9" + struct.pack("<i", -len(code) // 2 - 5).hex(), rcx=0, rdx=0)
    while state_of(vm).rdx < 3:  # it runs: no test is attached yet
        vm.resume()
        vm.wait(0.002)
        vm.pause()
    vm.attach_sync(True)
    vm.resume()
    assert vm.wait(60) is VmStatus.PAUSED
    state = state_of(vm)
    assert (state.rip, state.rdx - state.rcx) == (PROGRAM_BASE + 2 + before + 2, 1)
    assert state.rdx > 1


def test_every_effect_is_returned_by_run_at_its_instruction(machines):
    # out clock, eax; out sync, al; out exit, ax: one block of code
    vm = machines("e7f0" + "e6ec" + "66e7f4", rax=0x1234)
    vm.attach_sync(True)
    vcpu = vm.vcpus[0]
    assert vcpu.run() == Wait(0x1234 / 1e6)
    assert vcpu.run() == SyncPoint(0x34)
    assert vcpu.run() == GuestExit(0x1234)
    assert vcpu.save().rip == PROGRAM_BASE + 7


def test_ports_by_immediate_and_by_dx_and_in_all_sizes(machines):
    # al -> console by dx; in al, 0x3fd; in eax by dx from a port that nothing answers; out exit
    vm = machines("66baf803" + "b041" + "ee" + "66bafd03" + "ec" + "3c60" + "7509" + "66ba0010" + "ed" + EXIT + "f4")
    output = bytearray()
    vm.on_console(output.extend)
    assert finish(vm).exit_code == 0xFFFF_FFFF
    assert output == b"A"


def test_a_long_slice_of_untrapped_ports_after_a_wait_is_not_an_exception(machines):
    # xor eax, eax; out clock, eax; mov ecx, 100000; mov edx, 0x3fd; l: in al, dx; dec ecx; jne l; out exit 0
    vm = machines("31c0" + "e7f0" + "b9a0860100" + "bafd030000" + "ec" + "ffc9" + "75fb" + "31c0" + EXIT)
    assert finish(vm).crash is None


def test_a_counting_loop_paused_50_times_loses_nothing(machines):
    # l: inc rdx; inc [rbx]; inc rcx; inc [rbx+8]; jmp +0; jmp l
    vm = machines("48ffc2" + "48ff03" + "48ffc1" + "48ff4308" + "eb00" + "ebef", rbx=DATA, rcx=0, rdx=0)
    # How far rcx, [rbx] and [rbx+8] are behind rdx at each instruction.
    behind = {0: (0, 0, 0), 3: (1, 1, 1), 6: (1, 0, 1), 9: (0, 0, 1), 13: (0, 0, 0), 15: (0, 0, 0)}

    def check(state):
        n, words = state.rdx, (vm.memory.read_u64(DATA), vm.memory.read_u64(DATA + 8))
        assert (n - state.rcx, n - words[0], n - words[1]) == behind[state.rip - PROGRAM_BASE]

    counted_pauses(vm, check)
    assert state_of(vm).rdx > 50


def test_faulting_writes_are_made_once_however_often_the_guest_is_cleaned(machines):
    # rbx: page; l: inc [rbx]; add rbx, 4096; inc rcx; cmp rcx, 2000; jne l; xor ecx, ecx; mov rbx, rsi; inc rdx; jmp l
    code = "48ff03" + "4881c300100000" + "48ffc1" + "4881f9d0070000" + "75ea" + "31c9" + "4889f3" + "48ffc2" + "ebe0"
    vm = machines(code, rbx=DATA, rsi=DATA, rcx=0, rdx=0)
    vm.paging.enable()
    vm.resume()
    for _ in range(60):
        vm.paging.clean()
    vm.pause()
    state = state_of(vm)
    counts = [vm.memory.read_u64(DATA + 4096 * page) for page in range(2000)]
    at = state.rip - PROGRAM_BASE
    written = state.rcx + (1 if at in (3, 10) else 0)  # between the INC of memory and that of rcx
    lap = state.rdx + (1 if at in (24, 27) else 0)  # a lap ends before rdx says so
    assert counts == [lap + 1] * written + [lap] * (2000 - written)


def test_device_accesses_are_made_once_while_the_guest_is_paused_over_and_over(machines):
    # FILL 8 bytes at DATA, flag at DATA+4096. l: inc r12; store the command; load the status; jmp l
    target, flag = struct.pack("<I", DATA).hex(), struct.pack("<I", DATA + 4096).hex()
    setup = "48c74308" + target + "48c74310" + "08000000" + "48c74318" + flag
    loop = "49ffc4" + "c7432801000000" + "8b432c" + "ebf1"
    vm = machines(setup + loop, rbx=DMA_MMIO, r12=0)
    begin = PROGRAM_BASE + len(setup) // 2

    def check(state):
        if state.rip >= begin:
            assert state.r12 - vm.memory.read_u64(DATA + 4096) == (1 if state.rip == begin + 3 else 0)

    counted_pauses(vm, check, pauses=10)
    assert struct.unpack_from("<Q", vm.platform.dma.save(), 0x30)[0] == vm.memory.read_u64(DATA + 4096)


def test_an_8_byte_device_access_arrives_in_halves(machines):
    # mov [rbx+0x20], rax; mov rdi, [rbx+0x20]; out exit
    vm = machines("48894320" + "488b7b20" + EXIT, rbx=DMA_MMIO, rax=0x1122_3344_5566_7788)
    assert finish(vm).exit_code == 0x5566_7788
    assert state_of(vm).rdi == 0x1122_3344_5566_7788


def test_space_that_is_neither_ram_nor_a_device_reads_ones_and_takes_writes(machines):
    # mov rdi, [rbx]; mov [rbx], rax; mov rsi, [rbx]; out exit
    vm = machines("488b3b" + "488903" + "488b33" + EXIT, rbx=0x4000_0000, rax=3)
    assert finish(vm).exit_code == 3
    assert (state_of(vm).rdi, state_of(vm).rsi) == ((1 << 64) - 1,) * 2


def test_an_effect_of_a_device_store_is_refused_not_done_twice(machines):
    vm = machines("8903" + EXIT, rbx=DMA_MMIO)
    vm.platform.dma.write = lambda offset, size, value: GuestExit(1)
    assert "the machine failed: a store to device space at gpa 0xfeb00000" in finish(vm).crash


SWEEP = "b9{pages}" + "488903" + "4881c300100000" + "ffc9" + "75f2" + SYNC + "4889f3" + "ebe6"


def test_one_nested_fault_per_page_per_cycle_and_the_page_tables_are_among_them(machines):
    pages = 700
    # l: mov ecx, pages; m: mov [rbx], rax; add rbx, 4096; dec ecx; jne m; out sync; mov rbx, rsi; jmp l
    vm = machines(SWEEP.format(pages=struct.pack("<I", pages).hex()), rbx=DATA, rsi=DATA)
    vm.attach_sync(True)
    vm.paging.enable()
    expected = [*TABLES, *range(DATA >> 12, (DATA >> 12) + pages)]
    faults = 0
    for _ in range(4):
        assert finish(vm) is None
        assert vm.paging.stats().fault_count - faults == len(expected)
        faults = vm.paging.stats().fault_count
        assert finish(vm) is None  # once more over the same pages: no fault
        assert vm.paging.stats().fault_count == faults
        invariants.check(vm)
        assert vm.paging.clean().gfns().tolist() == expected


def test_a_page_that_was_read_first_is_logged_when_it_is_written(machines):
    # l: mov rax, [rbx]; inc rax; mov [rbx], rax; out sync; jmp l
    vm = machines("488b03" + "48ffc0" + "488903" + SYNC + "ebf3", rbx=DATA)
    vm.attach_sync(True)
    vm.paging.enable()
    for _ in range(3):
        assert finish(vm) is None
        assert vm.paging.clean().gfns().tolist() == [*TABLES, DATA >> 12]
    assert vm.memory.read_u64(DATA) == 3


def test_reading_dirties_only_what_the_walker_touches(machines):
    # l: mov rax, [rbx]; out sync; jmp l
    vm = machines("488b03" + SYNC + "ebf9", rbx=DATA)
    vm.attach_sync(True)
    vm.paging.enable()
    for _ in range(3):
        assert finish(vm) is None
        assert vm.paging.clean().gfns().tolist() == TABLES


ROUND = (
    "660fd4c1"  # paddq xmm0, xmm1
    "660ff9fa"  # psubw xmm7, xmm2
    "440f28f8"  # movaps xmm15, xmm0
    "d9e8dec1"  # fld1; faddp
    "64480301"  # add rax, fs:[rcx]
    "11d2"  # adc edx, edx
    "01c2"  # add edx, eax
    "48ffc7"  # inc rdi
    "4c39c7"  # cmp rdi, r8
)
ARITHMETIC = ROUND + "75" + bytes([256 - len(ROUND) // 2 - 2]).hex() + EXIT


def fxsave(xmm):
    image = bytearray(entry_state(0, 0).fpu_regs)
    struct.pack_into("<HHB", image, 0, 0x37F, 0x3000, 0xC0)  # two values on the x87 stack, its top at 6
    struct.pack_into("<QH6xQH", image, 32, 0x8000_0000_0000_0000, 0x3FFF, 0xC000_0000_0000_0001, 0x4001)
    for register in range(16):
        low, high = xmm * (register + 1) % (1 << 64), (xmm >> register) ^ 0xFFFF_FFFF
        struct.pack_into("<QQ", image, 160 + 16 * register, low, high)
    return bytes(image)


def test_a_guest_that_changes_machines_every_so_often_computes_the_same(machines):
    fs = replace(entry_state(0, 0).fs, base=DATA)
    registers = {"rdi": 0, "rcx": 8, "fpu_regs": fxsave(0x0123_4567_89AB_CDEF), "fs": fs}

    def start(rounds):
        vm = machines(ARITHMETIC, r8=rounds, **registers)
        vm.memory.write(DATA + 8, struct.pack("<Q", 0x9E37_79B9_7F4A_7C15))
        return vm

    vm = start(1 << 63)  # for ever
    for _ in range(6):
        work_on(vm)
        other = machines()
        runs = vm.memory.populated()
        for source, target in zip(vm.memory.views(*runs), other.memory.views(*runs), strict=True):
            target[:] = source
        other.load_state(vm.save_state())
        vm = other
    rounds = state_of(vm).rdi + 1000
    load(vm, replace(state_of(vm), r8=rounds))
    alone = start(rounds)
    assert finish(vm) == finish(alone)
    assert state_of(vm).rdi == rounds
    assert replace(state_of(vm), tsc=0) == replace(state_of(alone), tsc=0)


def test_a_state_of_another_machine_comes_out_as_it_went_in(machines):
    odd = Segment(selector=0x8B, base=0xFFFF_8000_1234_0000, limit=0x1234, attributes=0x8B)
    state = replace(
        entry_state(PROGRAM_BASE, 0),
        **{name: 0x1111_1111_1111_1111 * n for n, name in enumerate(("rax", "rbx", "r8", "r15", "rsi"), start=3)},
        rflags=0x3ED7 & ~0x400 | 0x200,
        cr2=0xDEAD_B000,
        dr0=0x1000,
        dr7=0x402,
        tr=odd,
        ldtr=replace(odd, attributes=0x82),
        fs=replace(odd, selector=0x23),
        gs=replace(odd, base=0x7F00_0000_0000),
        gdtr=DescriptorTable(base=0xFFFF_FE00_0000_0000, limit=0x7F),
        idtr=DescriptorTable(base=0xFFFF_FE00_0000_1000, limit=0xFFF),
        cr4=0x406F0,
        efer=0xD01,
        lstar=0xFFFF_FFFF_8100_0000,
        star=0x23_0010 << 32,
        shadow_gs=0xFFFF_8880_0000_0000,
        tsc_aux=3,
        msrs=((0x277, 0x0007_0106_0007_0406),),
        fpu_regs=fxsave(0xFEDC_BA98_7654_3210),
        tsc=1 << 50,
    )
    vm = machines()
    load(vm, state)
    saved = state_of(vm)
    assert saved == replace(state, tsc=saved.tsc)
    assert 0 <= saved.tsc - state.tsc < 1 << 36


@pytest.mark.parametrize("times", range(5))
def test_the_guest_reads_its_own_time_stamp_counter(machines, times):
    # rdtsc; mov rbx, rdx, so many times; then a divide error, which is still called by its name
    vm = machines("0f314889d3" * times + "31c9f7f1", tsc=5 << 40, rbx=5 << 8)
    assert f"divide error at rip {PROGRAM_BASE + 5 * times + 2:#x}" in finish(vm).crash
    assert state_of(vm).rbx == 5 << 8


def test_rdtscp_gives_the_processor_id(machines):
    vm = machines("0f01f9" + "89c8" + EXIT, tsc=5 << 40, tsc_aux=77)
    assert finish(vm).exit_code == 77


def test_a_state_that_cannot_run_here_is_refused_and_the_old_one_stays(machines):
    vm = machines("b807000000" + EXIT)
    state = state_of(vm)
    for refused, what in (
        ({"cr0": state.cr0 & ~1}, "real mode"),
        ({"rflags": state.rflags | 1 << 17}, "virtual-8086 mode"),
        ({"efer": 0}, "32-bit paging"),
        ({"ss": replace(state.ss, attributes=0xCB3)}, "ring 1"),
        ({"mp_state": MpState.INIT_RECEIVED}, "INIT_RECEIVED"),
    ):
        with pytest.raises(UnsupportedError, match=what):
            load(vm, replace(state, **refused))
    with pytest.raises(VmError, match="512"):
        load(vm, replace(state, fpu_regs=b"short"))
    with pytest.raises(UnsupportedError, match="no MSR 0x1d9"):
        load(vm, replace(state, msrs=((0x1D9, 1), (0x277, 0x0007_0406_0007_0406))))
    assert finish(vm).exit_code == 7


def test_nothing_runs_before_a_state_is_loaded(machines):
    vm = machines()
    assert state_of(vm).rip == 0xFFF0
    with pytest.raises(VmError, match="no state"):
        vm.vcpus[0].run()


def test_code_that_was_written_while_the_guest_was_paused_is_what_runs(machines):
    vm = machines("b801000000" + SYNC + "ebf7")
    vm.attach_sync(True)
    assert finish(vm) is None
    assert finish(vm) is None
    vm.memory.write(PROGRAM_BASE, bytes.fromhex("b809000000" + EXIT))
    assert finish(vm).exit_code == 9


def test_a_guest_rewrites_its_own_code(machines):
    # l: mov eax, 1; cmp byte [l+1], 1; jne done; mov byte [l+1], 9; jmp l; done: out exit
    at = struct.pack("<I", PROGRAM_BASE + 1).hex()
    vm = machines("b801000000" + "803c25" + at + "01" + "750a" + "c60425" + at + "09" + "ebe7" + EXIT)
    assert finish(vm).exit_code == 9


@pytest.mark.parametrize(
    "code",
    [
        "c6050100000007" + "b801000000",  # movb $7, next + 1; next: movl $1, %eax
        "c605f9ffffff90" + "b807000000",  # me: movb $0x90, me
        "bf0f001000b901000000b007f3aa" + "b801000000",  # rep stosb
        "bc00081000" + "9c58" + "2500010000" + "83c807",  # pushf: the flags are its own
    ],
)
def test_what_an_instruction_changes_in_its_own_block_is_what_runs(machines, code):
    assert finish(machines(code + EXIT)).exit_code == 7


def test_a_write_to_read_only_ram_is_discarded_and_the_guest_goes_on(machines):
    # mov [rbx], rax; mov rdi, [rbx]; add [rbx], rax; mov rsi, [rbx]; mov eax, 7; out exit
    vm = machines("488903" + "488b3b" + "480103" + "488b33" + "b807000000" + EXIT, rbx=DATA, rax=9)
    vm.memory.write(DATA, b"\x05")
    with vm.p2m.lock:
        vm.p2m.change_type(DATA >> 12, P2MType.RAM_RW, P2MType.RAM_RO)
    vm.paging.enable()
    assert finish(vm).exit_code == 7
    assert (state_of(vm).rdi, state_of(vm).rsi, vm.memory.read_u64(DATA)) == (5, 5, 5)
    assert not vm.paging.clean().test(DATA >> 12)


def test_a_guest_writes_a_granted_page_and_crashes_on_one_that_is_read_only(machines):
    for writable in (True, False):
        # mov rdi, [rbx]; mov [rbx], rax; mov eax, 7; out exit
        vm = machines("488b3b" + "488903" + "b807000000" + EXIT, rbx=DATA, rax=9)
        theirs = vm.machine.allocate_foreign()
        vm.machine.frame(theirs)[0] = 5
        vm.physmap.decrease_reservation(DATA >> 12)
        vm.physmap.map_grant(DATA >> 12, theirs, writable=writable)
        vm.paging.enable()
        end = finish(vm)
        assert state_of(vm).rdi == 5
        assert vm.machine.frame(theirs)[0] == (9 if writable else 5)
        if writable:
            assert end.exit_code == 7
            assert vm.paging.clean().test(DATA >> 12)
        else:
            assert end.crash.startswith("write to gfn 0x300, which is grant_map_ro")


def test_a_running_guest_sees_its_page_move_and_crashes_when_it_is_taken(machines):
    # l: inc [rbx]; inc rcx; jmp l
    vm = machines("48ff03" + "48ffc1" + "ebf8", rbx=DATA, rcx=0)
    gfn, other = DATA >> 12, (DATA >> 12) + 600
    vm.paging.enable()
    vm.resume()
    for _ in range(20):  # there and back, under its feet
        vm.freeze()
        vm.physmap.add_to_physmap(gfn, other)
        vm.physmap.add_to_physmap(other, gfn)
        vm.thaw()
        vm.wait(0.001)
    vm.pause()
    assert vm.memory.read_u64(DATA) - state_of(vm).rcx in (0, 1)
    vm.physmap.decrease_reservation(gfn)
    assert "access to gfn 0x300, which is invalid" in finish(vm).crash
