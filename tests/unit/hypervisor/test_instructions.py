import pytest

from pageferry.hypervisor.instructions import decode


@pytest.mark.parametrize(
    ("code", "loads_descriptor", "changes_memory", "uses_stack"),
    [
        ("8ed8", True, False, False),  # mov ds, eax
        ("0fb2 00", True, False, False),  # lss
        ("ff28", True, False, False),  # jmp far [rax]
        ("ff20", False, False, False),  # jmp [rax]
        ("ff10", False, False, True),  # call [rax]
        ("48cf", True, False, True),  # iretq
        ("488b00", False, False, False),  # mov rax, [rax]
        ("48ff00", False, True, False),  # inc [rax]
        ("48ffc0", False, False, False),  # inc rax
        ("f0 48 0fb108", False, True, False),  # lock cmpxchg [rax], rcx
        ("838000000000 01", False, True, False),  # add [rax+0], 1
        ("833801", False, False, False),  # cmp [rax], 1
        ("f61e", False, True, False),  # neg [rsi]
        ("f626", False, False, False),  # mul [rsi]
        ("8a4500", False, False, True),  # mov al, [rbp]
        ("658a4500", False, False, False),  # the same by GS
        ("418a4500", False, False, False),  # mov al, [r13]
        ("8a0424", False, False, True),  # mov al, [rsp]
        ("8a042500000000", False, False, False),  # mov al, [0]
        ("8a0500000000", False, False, False),  # mov al, [rip]
        ("50", False, False, True),  # push rax
        ("48c3", False, False, True),  # ret
        ("", False, True, False),  # nothing reads as ADD [rax], al
    ],
)
def test_what_an_instruction_does_to_memory(code, loads_descriptor, changes_memory, uses_stack):
    instruction = decode(bytes.fromhex(code))
    assert instruction.loads_descriptor is loads_descriptor
    assert instruction.changes_memory is changes_memory
    assert instruction.uses_stack is uses_stack
