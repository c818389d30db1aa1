"""Instruction intercepts: OUT, RDTSC and RDTSCP leave the guest before they execute, as under SVM.

Unicorn has no intercepts: a stop asked for in its OUT callback takes effect at the end of the translated block, which
may be several instructions (and another I/O) later. But a *code hook* on one address can stop exactly there. So every
page that the guest fetches from is scanned once for bytes that could begin such an instruction, and those addresses
get a hook. A false hit costs nothing: no instruction ever begins there, or the hook sees that it is another.

The scan repeats when the page's bytes have changed. Code that the guest rewrites under its own feet, without the page
leaving the TLB, is caught by the OUT callback: performed at once, and stopped at the end of its block.
"""

from dataclasses import dataclass

import numpy as np

from pageferry.core.frames import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Out:
    """OUT: ``port`` is None for DX."""

    length: int
    size: int
    port: int | None


@dataclass(frozen=True, slots=True)
class ReadTsc:
    """RDTSC, or RDTSCP with ``aux``."""

    length: int
    aux: bool


Intercept = Out | ReadTsc


def decode(code: bytes) -> Intercept | None:
    """Return the intercepted instruction that ``code`` (up to 4 bytes) begins with, if any."""
    prefix = 1 if code[:1] == b"\x66" else 0
    opcode = code[prefix : prefix + 1]
    if opcode in (b"\xe6", b"\xe7", b"\xee", b"\xef"):
        size = 1 if opcode in (b"\xe6", b"\xee") else 2 if prefix else 4
        if opcode in (b"\xe6", b"\xe7"):
            return Out(prefix + 2, size, code[prefix + 1])
        return Out(prefix + 1, size, None)
    if code[:2] == b"\x0f\x31":
        return ReadTsc(2, aux=False)
    if code[:3] == b"\x0f\x01\xf9":
        return ReadTsc(3, aux=True)
    return None


def candidates(page: bytes) -> list[int]:
    """Return the offsets in a page of code where an intercepted instruction may begin.

    The start of the next page is always among them: translation may run on into it before it was seen.
    """
    code = np.frombuffer(page, np.uint8)
    following = np.append(code[1:], 0)
    last = np.zeros(PAGE_SIZE, np.bool_)
    last[-1] = True
    is_out = code & 0xF6 == 0xE6  # E6, E7, EE, EF
    is_prefixed_out = (code == 0x66) & ((following & 0xF6 == 0xE6) | last)
    is_tsc = (code == 0x0F) & ((following == 0x31) | (following == 0x01) | last)
    return [*np.flatnonzero(is_out | is_prefixed_out | is_tsc).tolist(), PAGE_SIZE]
