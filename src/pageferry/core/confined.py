"""A vCPU that cannot leave ring 3, as every guest of the guest ABI, and the instructions that end one.

It has no handlers and IOPL 0, so a privileged instruction, and each way into a kernel, is an exception that ends the
guest. A machine that sees one end asks here what to say, so the same guest ends with the same words on all of them.

Source: docs/reference/guest-abi.md, "Forbidden instructions"; AMD APM volume 3, appendix A (opcode maps).
"""

from pageferry.core.errors import GuestCrash
from pageferry.core.state import NO_KERNEL_GVA, VcpuState

MAX_INSTRUCTION_BYTES = 15

#: What the ABI forbids, by name, each with machine code of one.
FORBIDDEN: dict[str, bytes] = {
    name: bytes.fromhex(code)
    for name, code in {
        "CLI": "fa",
        "STI": "fb",
        "HLT": "f4",
        "INT": "cd80",
        "SYSCALL": "0f05",
        "SYSENTER": "0f34",
        "SYSRET": "480f07",
        "SYSEXIT": "480f35",
        "SWAPGS": "0f01f8",
        "LGDT": "0f011425 00001800",
        "LIDT": "0f011c25 00001800",
        "LLDT": "0f00d0",
        "LTR": "0f00d8",
        "LMSW": "0f01f0",
        "CLTS": "0f06",
        "MOV CRn": "0f22d8",
        "MOV DRn": "0f21f8",
        "RDMSR": "0f32",
        "WRMSR": "0f30",
        "XSETBV": "0f01d1",
        "INVLPG": "0f013c25 00001800",
        "INVD": "0f08",
        "WBINVD": "0f09",
        "MONITOR": "0f01c8",
        "MWAIT": "0f01c9",
    }.items()
}

#: What the ABI leaves undefined: some machines end the guest, some let it pass and do not agree on what it does.
UNDEFINED: dict[str, bytes] = {
    name: bytes.fromhex(code)
    for name, code in {
        "MOV DS": "b82b000000 8ed8",
        "POP FS": "0fa0 0fa1",
        "XGETBV": "31c9 0f01d0",
        "XSAVE": "0fae2425 00001800",
        "WRFSBASE": "f3480faed0",
        "VMCALL": "0f01c1",
        "VMMCALL": "0f01d9",
    }.items()
}

_PREFIXES = frozenset(bytes.fromhex("26 2e 36 3e 64 65 66 67 f0 f2 f3"))
_REX, _TWO_BYTES, _REGISTER = 0x40, 0x0F, 3
_ONE_BYTE = {0xFA: "CLI", 0xFB: "STI", 0xF4: "HLT", 0xCD: "INT"}
_TWO = {
    0x05: "SYSCALL",
    0x06: "CLTS",
    0x07: "SYSRET",
    0x08: "INVD",
    0x09: "WBINVD",
    0x20: "MOV CRn",
    0x21: "MOV DRn",
    0x22: "MOV CRn",
    0x23: "MOV DRn",
    0x30: "WRMSR",
    0x32: "RDMSR",
    0x34: "SYSENTER",
    0x35: "SYSEXIT",
}
_BY_REG = {(0x00, 2): "LLDT", (0x00, 3): "LTR", (0x01, 6): "LMSW"}
_BY_REG_IN_MEMORY = {2: "LGDT", 3: "LIDT", 7: "INVLPG"}
_BY_MODRM = {0xC8: "MONITOR", 0xC9: "MWAIT", 0xD1: "XSETBV", 0xF8: "SWAPGS"}


def is_confined(state: VcpuState) -> bool:
    """Tell whether a vCPU is in ring 3 with no way out: no IDT, no GDT, no SYSCALL and no SYSENTER.

    An LDT does not count as a way out, though a guest could build a gate in it: a reset CPU has one, and none is used.
    """
    doors = (state.idtr.limit, state.gdtr.limit, state.efer & 1, state.sysenter_cs)  # EFER.SCE
    return state.cs.selector & 3 == 3 and not any(doors)


def forbidden(code: bytes) -> str | None:
    """Return the name in :data:`FORBIDDEN` of the instruction that ``code`` begins with; None: it is none of them."""
    at = 0
    while at < len(code) and code[at] in _PREFIXES:
        at += 1
    if at < len(code) and code[at] & 0xF0 == _REX:
        at += 1
    first, second, modrm = (code[at : at + 3] + bytes(3))[:3]
    if first != _TWO_BYTES:
        return _ONE_BYTE.get(first)
    if second > 1:
        return _TWO.get(second)
    reg, in_memory = modrm >> 3 & 7, modrm >> 6 != _REGISTER
    name = _BY_REG.get((second, reg))
    if name is None and second:
        name = _BY_REG_IN_MEMORY.get(reg) if in_memory else _BY_MODRM.get(modrm)
    return name


def crash(code: bytes, *, rip: int, rsp: int, rcx: int) -> GuestCrash | None:
    """Return the end of a confined guest by a forbidden instruction; None: it ended by something else.

    Args:
        code: what can be read at ``rip``.
        rip: where the exception left it: at the instruction, or where a machine went on that takes SYSCALL for one.
        rsp: its stack pointer.
        rcx: its RCX, where SYSCALL leaves the next instruction's address.
    """
    if rip == NO_KERNEL_GVA and not code:
        name, rip = "SYSCALL", rcx - len(FORBIDDEN["SYSCALL"])
    else:
        name = forbidden(code) or ""
    if not name:
        return None
    return GuestCrash(f"{name}, which the guest ABI forbids, at rip {rip:#x} (rsp={rsp:#x})")
