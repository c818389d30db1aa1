"""The guest program of a scenario as an image that QEMU's ``-kernel`` takes: the very bytes that pageferry runs.

The image is ``shim.S`` and, behind it, the program's segments, its page tables and its information page, each with the
place where it belongs (docs/reference/guest-abi.md). A PC has a hole and ROMs where that ABI has the stacks, below
1 MiB, and the shim lies at 4 MiB: so the stack is lower and the working set begins at 8 MiB. Nothing else differs.
"""

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pageferry.core.errors import UnsupportedError, UsageError
from pageferry.core.memory import GuestMemory
from pageferry.guests import abi
from pageferry.guests.boot import GuestParams, plan
from pageferry.guests.workloads import load_workload

#: Source of the name: benchmarks/peers/shim.S.
_SHIM = Path(__file__).with_name("shim.S")
_SHIM_GPA = 0x400000
_WORKING_SET_GPA = 0x800000
PROGRAM = "rewrite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A guest: its memory, how much of that it fills, and how much it then rewrites for ever (0: it idles)."""

    memory_bytes: int
    filled_bytes: int
    rewritten_bytes: int


def assemble_shim(folder: Path) -> bytes:
    """Return the machine code of ``shim.S``.

    Raises:
        UnsupportedError: the host has no assembler or linker.
    """
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            raise UnsupportedError(tool, f"{tool} is needed for QEMU's guest image", hint="apt install binutils")
    shim_object, shim = folder / "shim.o", folder / "shim.bin"
    subprocess.run(["as", "--64", "-o", shim_object, _SHIM], check=True)
    subprocess.run(["ld", f"-Ttext={_SHIM_GPA:#x}", "--oformat", "binary", "-o", shim, shim_object], check=True)
    return shim.read_bytes()


def build_image(shim: bytes, load: Load) -> bytes:
    """Return the image of a guest with one vCPU.

    Raises:
        UsageError: the load does not fit into its memory, or the program into the room below the shim.
    """
    program = load_workload(PROGRAM)
    if program.end_gpa > _SHIM_GPA:
        raise UsageError(f"{program.name} ends at {program.end_gpa:#x}, where the shim is")
    memory = GuestMemory.linear(load.memory_bytes)
    params = GuestParams(
        working_set_bytes=load.filled_bytes, working_set_gpa=_WORKING_SET_GPA, arguments=(load.rewritten_bytes,)
    )
    info = plan(program, memory, cpus=1, params=params)
    end_of_ram = memory.gfn_limit << 12
    memory.close()
    parts = [(abi.PAGE_TABLES_GPA, abi.page_tables(end_of_ram)), (abi.INFO_GPA, info.pack())]
    parts += [(segment.gpa, segment.data.ljust(segment.size_bytes, b"\0")) for segment in program.segments]
    return b"".join((shim, struct.pack("<I", program.entry), *(_part(*part) for part in parts), bytes(8)))


def _part(gpa: int, data: bytes) -> bytes:
    padded = data + bytes(-len(data) % 4)
    return struct.pack("<II", gpa, len(padded) // 4) + padded
