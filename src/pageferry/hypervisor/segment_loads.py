"""Which instructions have the processor itself read a descriptor table.

A program may load a segment register although it may not read the table that the descriptor is in: the processor reads
it as a supervisor. The emulator asks the MMU for such a read as for any other, so the instruction must tell.

Source: AMD APM volume 3, appendix A (opcode maps): MOV, POP, LES, LDS, LSS, LFS, LGS; far JMP, CALL and RET; IRET; LAR,
LSL, VERR, VERW.
"""

_PREFIXES = frozenset(bytes.fromhex("26 2e 36 3e 64 65 66 67 f0 f2 f3"))
_REX = range(0x40, 0x50)
_ONE_BYTE = frozenset(bytes.fromhex("8e 07 17 1f c4 c5 9a ea ca cb cf"))
_TWO_BYTES = frozenset(bytes.fromhex("00 02 03 a1 a9 b2 b4 b5"))
_GROUP_5, _FAR = 0xFF, (3, 5)


def reads_descriptor(code: bytes) -> bool:
    """Tell whether the instruction that ``code`` begins with may load a segment register or look at a descriptor."""
    at = 0
    while at < len(code) and (code[at] in _PREFIXES or code[at] in _REX):
        at += 1
    opcode, follows = code[at : at + 1], code[at + 1 : at + 2]
    if not opcode or not follows:
        return bool(opcode) and opcode[0] in _ONE_BYTE
    if opcode[0] == 0x0F:
        return follows[0] in _TWO_BYTES
    return opcode[0] in _ONE_BYTE or (opcode[0] == _GROUP_5 and follows[0] >> 3 & 7 in _FAR)
