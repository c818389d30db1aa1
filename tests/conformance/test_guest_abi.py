"""What docs/reference/guest-abi.md promises of instructions: the same on every machine, and the same end."""

import re
import shlex
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from machines import KINDS
from tiers import sample

from pageferry.core.confined import FORBIDDEN, UNDEFINED, forbidden
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.guests.abi import read_status
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.elf import LoadSegment, Program, load_elf
from pageferry.hypervisor.domain import Domain

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "guest-abi.md"
MIB = 1 << 20
ENTRY, STACK, RESULT = 0x100000, 0x180000, 0x190000
#: mov al, 7; out 0xf4, al
EXIT_7 = bytes.fromhex("b007e6f4")
#: The same to RESULT and on: pushfq; pop [RESULT]
SHOW_FLAGS = bytes.fromhex("9c 8f0425") + struct.pack("<I", RESULT)
BEHIND_RAM = struct.pack("<I", 16 * MIB)

QUICK = [kind for kind in KINDS if kind.name in ("kvm/kvm-bitmap", "soft/hap")]
pytestmark = pytest.mark.parametrize(
    "kind",
    sample(KINDS, "a guest sees nothing of trackers and paging modes", quick=QUICK),
    ids=str,
    indirect=True,
)


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """The program of the document, built by the command of the document."""
    text = DOCUMENT.read_text()
    (source,) = re.findall(r"```c\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"^    (gcc .*?mine\.c)$", text, re.DOTALL | re.MULTILINE)
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.c").write_text(source)
    arguments = shlex.split(command.replace("\\\n", " "))
    if shutil.which(arguments[0]) is None:
        pytest.skip("no C compiler on this machine")
    subprocess.run(arguments, cwd=folder, check=True)
    return load_elf(folder / "mine.elf")


def test_the_program_of_the_document_runs_and_finds_a_lost_page(kind, documented):
    vm = kind.make_vm(VmConfig(memory_bytes=8 * MIB, cpus=2))
    said = bytearray()
    vm.on_console(said.extend)
    info = boot(vm, documented, params=GuestParams(working_set_bytes=4 * PAGE_SIZE, arguments=(10**6,)))
    vm.resume()
    while read_status(vm.memory, 1)[0].work < 3:
        assert vm.wait(0.001) is VmStatus.RUNNING
    vm.pause()
    assert said == b"mine: at work\n"
    vm.memory.write(info.working_set_gpa + 2 * PAGE_SIZE, bytes(PAGE_SIZE))
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert (vm.end.exit_code, read_status(vm.memory, 1)[0].error) == (1, 1)
    assert read_status(vm.memory, 1)[0].detail[0] // PAGE_SIZE == info.working_set_gpa // PAGE_SIZE + 2
    vm.close()


@pytest.fixture
def ends(kind):
    """Runs machine code as a guest of its own until it ends; returns its machine, still open."""
    made = []

    def run(code, *, via=None, memory_bytes=8 * MIB):
        vm = (via or kind.make_vm)(VmConfig(memory_bytes=memory_bytes))
        made.append(vm)
        data = code + EXIT_7
        program = Program(
            name="p",
            entry=ENTRY,
            segments=(LoadSegment(gpa=ENTRY, data=data, size_bytes=len(data), writable=False),),
            end_gpa=ENTRY + PAGE_SIZE,
        )
        boot(vm, program)
        if via is not None:
            made.append(kind.make_vm(vm.config))
            made[-1].memory.write(0, vm.memory.read(0, 2 * MIB))
            made[-1].load_state(vm.save_state())
            vm = made[-1]
        state = vm.save_state()
        vm.load_state(replace(state, vcpus=(replace(state.vcpus[0], rsp=STACK),)))
        vm.resume()
        assert vm.wait(60) is not VmStatus.RUNNING
        return vm

    yield run
    for vm in made:
        vm.close()


def expect_forbidden(vm, name, *, rip=ENTRY, rsp=STACK):
    """Check a guest's last words; where an AMD processor has lost the registers, KVM has none but these."""
    assert (vm.status, vm.end.exit_code) == (VmStatus.CRASHED, None)
    if vm.accel != "kvm" or "its registers are lost" not in vm.end.crash:
        assert vm.end.crash == f"{name}, which the guest ABI forbids, at rip {rip:#x} (rsp={rsp:#x})"


@pytest.mark.parametrize(
    "name", sample(FORBIDDEN, "one of each kind", quick=["CLI", "STI", "HLT", "SYSCALL", "INT", "LGDT", "WRMSR"])
)
def test_a_forbidden_instruction_ends_every_guest_with_the_same_words(ends, name):
    expect_forbidden(ends(FORBIDDEN[name]), name)


@pytest.mark.parametrize(
    "code", ["0f0b", "cc", "31c9f7f1", "488b0425f8ffffff"], ids=["UD2", "INT3", "divide by 0", "not mapped"]
)
def test_another_exception_ends_it_too_and_is_not_called_forbidden(ends, code):
    vm = ends(bytes.fromhex(code))
    assert (vm.status, vm.end.exit_code) == (VmStatus.CRASHED, None)
    assert "forbids" not in vm.end.crash


def test_it_is_found_where_the_guest_is_and_not_where_it_began(ends):
    call = bytes.fromhex("90" * 7 + "e800000000")  # call the next instruction
    expect_forbidden(ends(call + FORBIDDEN["CLI"]), "CLI", rip=ENTRY + len(call), rsp=STACK - 8)


@pytest.mark.parametrize("name", ["CLI", "SYSCALL"])
def test_a_guest_that_has_moved_ends_as_one_that_has_not(ends, name):
    expect_forbidden(ends(FORBIDDEN[name], via=Domain), name)


# pushfq; <op> qword [rsp], value; popfq
@pytest.mark.parametrize(
    "change",
    ["", "9c 48812424fffdffff 9d", "9c 48810c2400300000 9d"],
    ids=["as it began", "POPF clears IF", "POPF sets IOPL"],
)
def test_the_flags_are_those_of_ring_3_without_io_privilege(ends, change):
    vm = ends(bytes.fromhex(change) + SHOW_FLAGS)
    assert vm.end.exit_code == 7
    assert vm.memory.read_u64(RESULT) & 0x3200 == 0x200


@pytest.mark.parametrize("port", [0x5000, 0x7FFC])
def test_a_port_that_nothing_answers_reads_ones_and_takes_any_write(ends, port):
    # mov dx, port; xor eax, eax; out dx, eax; in eax, dx; mov [RESULT], eax
    code = b"\x66\xba" + struct.pack("<H", port) + bytes.fromhex("31c0 ef ed 890425") + struct.pack("<I", RESULT)
    vm = ends(code)
    assert vm.end.exit_code == 7
    assert vm.memory.read(RESULT, 4) == b"\xff" * 4


def test_behind_ram_there_is_nothing(ends):
    # mov qword [BEHIND_RAM], 0; mov rax, [BEHIND_RAM]; mov [RESULT], rax
    code = b"\x48\xc7\x04\x25" + BEHIND_RAM + bytes(4) + b"\x48\x8b\x04\x25" + BEHIND_RAM
    vm = ends(code + b"\x48\x89\x04\x25" + struct.pack("<I", RESULT))
    assert vm.end.exit_code == 7
    assert vm.memory.read(RESULT, 8) == b"\xff" * 8


def test_code_behind_ram_ends_a_guest(ends):
    assert ends(b"\xb8" + BEHIND_RAM + b"\xff\xe0").status is VmStatus.CRASHED  # mov eax, ...; jmp rax


@pytest.mark.parametrize("name", sample(UNDEFINED, "one of them", quick=["XGETBV"]))
def test_what_is_undefined_is_not_among_the_forbidden(ends, name):
    code = UNDEFINED[name]
    assert forbidden(code) is None
    vm = ends(code)
    assert vm.end.exit_code == 7 or "forbids" not in vm.end.crash
