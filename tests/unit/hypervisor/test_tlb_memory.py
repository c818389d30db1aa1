"""The TLB memory answers repeated misses, nine of ten in a kernel: here all of a loop's but the first."""

import pytest
from altered import alter
from ring0 import TABLES, Ring0

from pageferry.core.vm import VmStatus
from pageferry.hypervisor import countdown, tlb_memory

LOOP = """
    movl $1000, %ebx
1:  movq 0x800000, %rax
    addq %rax, 0xa00000
    movq %cr3, %rax
    movq %rax, %cr3
    decl %ebx
    jne 1b
    ret
"""


#: The same, with two pages that want the same place, and flushed as a kernel flushes global pages.
ALIASES = f"""
    movq {TABLES + 0x2000} + 8*5, %rax
    movq %rax, {TABLES + 0x2000} + 8*12  # so 0x1800000 is 0xa00000 as well
    movl $1000, %ebx
1:  movq 0x800000, %rax
    addq %rax, 0x1800000
    movq %cr4, %rax
    xorq $0x80, %rax
    movq %rax, %cr4
    xorq $0x80, %rax
    movq %rax, %cr4
    decl %ebx
    jne 1b
    ret
"""


def walks(program):
    """Run a program to its end; return how many misses were walked."""
    counted = []

    def wrap(sound):
        def walk(*args):
            counted.append(args)
            return sound(*args)

        return walk

    alter(program.vm.vcpus[0], "_walk_for_tlb", wrap)
    program.vm.resume()
    assert program.vm.wait(60) is VmStatus.SHUTDOWN
    assert program.vm.end.exit_code == 0
    return len(counted)


@pytest.fixture
def ring0(tmp_path):
    made = []

    def make(code):
        made.append(Ring0(tmp_path, code))
        made[-1].vm.memory.write(0x80_0000, b"\x03")
        return made[-1]

    yield make
    for one in made:
        one.vm.close()


def test_a_loop_that_flushes_is_walked_once(ring0):
    program = ring0(LOOP)
    assert walks(program) < 100
    assert program.vm.memory.read_u64(0xA0_0000) == 3000


def test_so_is_one_that_flushes_global_pages_and_whose_pages_want_one_place(ring0):
    program = ring0(ALIASES)
    assert walks(program) < 100
    assert program.vm.memory.read_u64(0xA0_0000) == 3000


def test_on_other_hosts_each_miss_is_walked_and_all_is_right(ring0, monkeypatch):
    for module in (countdown, tlb_memory):
        monkeypatch.setattr(module, "NATIVE_HOSTS", ())
    program = ring0(LOOP)
    assert walks(program) > 2000
    assert program.vm.memory.read_u64(0xA0_0000) == 3000


def test_an_answer_is_only_for_its_privilege_level(ring0):
    program = ring0(f"""
        andb $0xfb, {TABLES + 0x2000} + 8*4
        movq %cr3, %rax
        movq %rax, %cr3
        movl $100, %ebx
    1:  movq 0x800000, %rax
        movq %cr3, %rax
        movq %rax, %cr3
        decl %ebx
        jne 1b
        TRY TO_USER reads
        ret
        reads: movq 0x800000, %rax
    """)
    program.vm.resume()
    program.vm.wait(60)
    (record,) = program.log()
    assert (record.vector, record.error_code, record.cr2) == (14, 5, 0x80_0000)
