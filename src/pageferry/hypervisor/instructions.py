"""Decodes what an instruction does to memory, as far as a fault depends on it and the emulator does not tell.

- A program may load a segment register although it may not read the table that the descriptor is in: the processor
  reads it as a supervisor. The emulator asks the MMU for that read as for any other.
- An instruction that reads, changes and writes a place asks hardware for a page that it may write; the emulator first
  reads.
- An address that is not canonical is a stack fault where the instruction uses the stack segment.

Source: AMD APM volume 3, appendix A (opcode maps), 1.2 (prefixes, ModRM, SIB); volume 2, 8.2.13 (#SS).
"""

from typing import NamedTuple

_SEGMENT_OVERRIDES = frozenset(bytes.fromhex("26 2e 36 3e 64 65"))
_PREFIXES = _SEGMENT_OVERRIDES | frozenset(bytes.fromhex("66 67 f0 f2 f3"))
_REX, _REX_B = range(0x40, 0x50), 1
_TWO_BYTES = 0x0F00

# MOV to a segment register, POP of one, LES, LDS; far CALL, JMP, RET; IRET. LAR, LSL, VERR, VERW; LSS, LFS, LGS, POP.
_LOADS_DESCRIPTOR = frozenset(bytes.fromhex("8e 07 17 1f c4 c5 9a ea ca cb cf")) | frozenset(
    _TWO_BYTES | opcode for opcode in bytes.fromhex("00 02 03 a1 a9 b2 b4 b5")
)
# Arithmetic to r/m, XCHG, shifts; BTS, BTR, BTC, SHLD, SHRD, CMPXCHG, XADD.
_CHANGES = frozenset(bytes.fromhex("00 01 08 09 10 11 18 19 20 21 28 29 30 31 86 87 c0 c1 d0 d1 d2 d3")) | frozenset(
    _TWO_BYTES | opcode for opcode in bytes.fromhex("ab b3 bb a4 a5 ac ad b0 b1 c0 c1")
)
#: Opcodes that the register field of ModRM tells apart -> which of them change memory.
_CHANGES_BY_REG = {
    **dict.fromkeys((0x80, 0x81, 0x83), frozenset(range(7))),
    **dict.fromkeys((0xF6, 0xF7), frozenset({2, 3})),
    **dict.fromkeys((0xFE, 0xFF), frozenset({0, 1})),
    _TWO_BYTES | 0xBA: frozenset({5, 6, 7}),
    _TWO_BYTES | 0xC7: frozenset({1}),
}
# PUSH, POP, CALL, RET, ENTER, LEAVE, IRET, PUSHF, POPF; and by the register field CALL, PUSH.
_USES_STACK = frozenset(range(0x50, 0x60)) | frozenset(bytes.fromhex("68 6a 8f 9c 9d c2 c3 c8 c9 ca cb cf e8"))
_USES_STACK_BY_REG = {0xFF: frozenset({2, 3, 6})}
_FAR_BY_REG = {0xFF: frozenset({3, 5})}
_REGISTER, _STACK_BASES, _SIB = 3, (4, 5), 4


class Instruction(NamedTuple):
    """The parts of an instruction; ``opcode`` has 0F00h added in the second map; ``modrm`` and ``sib`` are 0 if cut."""

    opcode: int
    modrm: int
    sib: int
    rex: int
    overridden: bool
    """Whether a prefix names the segment."""

    @property
    def reg(self) -> int:
        """The register field of ModRM."""
        return self.modrm >> 3 & 7

    def _is_one_of(self, table: dict[int, frozenset[int]]) -> bool:
        return self.reg in table.get(self.opcode, ())

    @property
    def loads_descriptor(self) -> bool:
        """Whether the processor itself may read a descriptor table for it."""
        return self.opcode in _LOADS_DESCRIPTOR or self._is_one_of(_FAR_BY_REG)

    @property
    def changes_memory(self) -> bool:
        """Whether it reads a place and writes it."""
        if self.modrm >> 6 == _REGISTER:
            return False
        return self.opcode in _CHANGES or self._is_one_of(_CHANGES_BY_REG)

    @property
    def uses_stack(self) -> bool:
        """Whether its address is in the stack segment."""
        if self.opcode in _USES_STACK or self._is_one_of(_USES_STACK_BY_REG):
            return True
        mod, base, extended = self.modrm >> 6, self.modrm & 7, self.rex & _REX_B
        if self.overridden or mod == _REGISTER:
            return False
        if base == _SIB:
            base = self.sib & 7
        return not extended and base in _STACK_BASES and not (base == 5 and mod == 0)


def decode(code: bytes) -> Instruction:
    """Return the instruction that ``code`` begins with; bytes that are missing read as 0."""
    at, overridden = 0, False
    while at < len(code) and code[at] in _PREFIXES:
        overridden |= code[at] in _SEGMENT_OVERRIDES
        at += 1
    rest = code[at:] + bytes(5)
    rex = rest[0] if rest[0] in _REX else 0
    rest = rest[1:] if rex else rest
    opcode, rest = (_TWO_BYTES | rest[1], rest[2:]) if rest[0] == 0x0F else (rest[0], rest[1:])
    return Instruction(opcode=opcode, modrm=rest[0], sib=rest[1], rex=rex, overridden=overridden)
