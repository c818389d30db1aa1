"""What the KVM tests share: a machine with the identity map of the guest ABI, and small guests in machine code.

Every program starts at ``PROGRAM_GPA`` in ring 3 and may scribble on the page at ``DATA_GPA``.
"""

import contextlib
import ctypes
import dataclasses
import os
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from trips import Move

from pageferry.core.cpuid import CpuModel
from pageferry.core.errors import UnsupportedError
from pageferry.core.frames import SIZE_2M
from pageferry.core.memory import GuestMemory
from pageferry.core.state import MachineState, ring_3_state
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.kvm import uapi
from pageferry.kvm.trackers import DEFAULT_TRACKER, bitmap_tracker
from pageferry.kvm.vm import KvmVm
from pageferry.uffd.fds import check_userfaultfd
from pageferry.uffd.view import VcpuView

libc = ctypes.CDLL(None)  # releases the interpreter lock during a call
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

TABLES_GPA, PROGRAM_GPA, DATA_GPA, STACK_GPA = 0x1_0000, 0x10_0000, 0x18_0000, 0xF_F000
GATE_PORT = 0x500

PROGRAMS = {
    # 1: inc ebx; out 0x500, ebx; in eax, 0x500; cmp eax, ebx; jne 2f; mov [DATA], rbx; jmp 1b;  2: exit 1
    "exact": "31dbba00050000ffc389d8efed39d8750a48891c2500001800ebecb001e6f4",
    # 1: inc rbx; jmp 1b
    "spin": "48ffc3ebfb",
    # for ever: inc rbx (mod 256); each of the rsi pages from rdi gets rbx at offset 0 and at offset 8 * rbx; inc r8
    "stamp": "48ffc34889f84889f148891848891cd848050010000048ffc975ee81e3ff00000049ffc0ebda",
    # 1: paddq xmm0, xmm1; paddq xmm7, xmm1; paddq xmm15, xmm1; fadd st0, st1; inc rax; mov [DATA], rax; jmp 1b
    "sse": "660fd4c1660fd4f966440fd4f9d8c148ffc04889042500001800ebe4",
    # two sync points, showing 7 and then the answer + 1; exits with the sum of both answers
    "sync": "b807000000e7ece5ec89c3ffc0e7ece5ec01d8e7f4ebfe",
    # 1: inc rcx; let the DMA engine fill 0x1a0800+0x2000 with rcx; je 1b while its count is rcx;  exit 1
    "dma": ("bf0000b0fe48c7470800081a0048c747100020000048ffc148894f20c747280100000048394f3074ecb001e6f4"),
    # mov [rdi], r8; mov [rsi], r8; mov [rbp], r8; exit 0
    "touch": "4c89074c89064c89450031c0e6f4ebfe",
    # "hello" to the console by rep outsb; 4 dwords from port 0x500 by rep insd; exits with their sum
    "strings": (
        "488d353d000000b905000000baf8030000f36ebf00001800b904000000ba00050000f36d8b042500001800"
        "03042504001800030425080018000304250c001800e7f4ebfe68656c6c6f"
    ),
    # mov rdi, 0x123456789000; mov [rdi], al: not mapped
    "crash": "48bf00907856341200008807",
    # ud2
    "undefined": "0f0b",
    # an 8-byte store to 0xfd000ffd and loads of 8, 1, 2 and 4 bytes from there; exits with 0 if all agree, else 1
    "mmio": (
        "bf000000fd48b88877665544332211488987fd0f0000488b9ffd0f00004839d875320fb68ffd0f000081f98800000075230fb78f"
        "ff0f000081f96655000075148b8f0010000081f955443322750631c0e6f4ebfeb001e6f4"
    ),
    # wait 0.2 s by the clock port, then exit with 9
    "wait": "b8400d0300e7f0b009e6f4",
}


class Gate:
    """A test's own port: checks that the guest's n-th OUT says n; IN answers with n."""

    name = "gate"
    ports = range(GATE_PORT, GATE_PORT + 4)
    mmio = range(0)

    def __init__(self):
        self.count = 0
        self.reads = 0

    def read(self, offset, size):
        self.reads += 1
        return self.count

    def write(self, offset, size, value):
        assert value == self.count + 1, f"OUT number {self.count + 1} says {value}"
        self.count = value

    def save(self):
        return struct.pack("<QQ", self.count, self.reads)

    def load(self, data):
        self.count, self.reads = struct.unpack("<QQ", data)


def start_state(**changes):
    return dataclasses.replace(ring_3_state(rip=PROGRAM_GPA, rsp=STACK_GPA, cr3=TABLES_GPA), **changes)


def write_identity_map(memory):
    """2 MiB pages over the first 6 GiB, or only the first 4 in a guest too small for the tables."""
    gigabytes = 6 if memory.size_bytes > 3 << 30 else 4
    memory.write(TABLES_GPA, struct.pack("<Q", TABLES_GPA + 0x1007))
    entries = np.arange(gigabytes * 512, dtype=np.uint64) * np.uint64(SIZE_2M) | np.uint64(0x87)
    memory.write(TABLES_GPA + 0x2000, entries.tobytes())
    pointers = TABLES_GPA + 0x2007 + np.arange(gigabytes, dtype=np.uint64) * np.uint64(0x1000)
    memory.write(TABLES_GPA + 0x1000, pointers.tobytes())


def make_guest(
    program=None,
    *,
    memory_bytes=4 << 20,
    manual_protect=None,
    tracker=None,
    vcpus=(),
    devices=(),
    cpu=CpuModel.BASELINE,
    machine=MachineModel.PLAIN,
    **registers,
):
    """Return a paused machine; with ``program`` (a name) it is ready to run it with those registers."""
    states = vcpus or (start_state(**registers),)
    vm = KvmVm(
        VmConfig(memory_bytes=memory_bytes, cpus=len(states), cpu=cpu, machine=machine),
        tracker=tracker or (DEFAULT_TRACKER if manual_protect is None else bitmap_tracker(manual_protect)),
    )
    vm.platform.bus.add(*devices)
    if program is not None:
        write_identity_map(vm.memory)
        vm.memory.write(PROGRAM_GPA, bytes.fromhex(PROGRAMS[program]))
        vm.load_state(MachineState(vcpus=tuple(states), devices=vm.platform.bus.save()))
    return vm


def wait_for(vm, condition):
    """Wait until the running guest has made ``condition()`` true; a guest that ended fails the test."""
    pause = threading.Event()
    for _ in range(100_000):
        if condition():
            return
        assert vm.end is None, vm.end
        pause.wait(0.0005)
    raise AssertionError("the guest does not get there")


@pytest.fixture
def journey(inns):
    """Makes migrations of a guest to a machine that ``make_vm`` makes."""
    return lambda vm, make_vm: Move(vm, inns(make_vm))


@pytest.fixture
def kvm(kvm_support):
    """Makes guests (``kvm.guest(program, ...)``) and closes them; carries this file's helpers."""
    made = []

    def guest(*args, **kwargs):
        made.append(make_guest(*args, **kwargs))
        return made[-1]

    yield SimpleNamespace(
        guest=guest,
        support=kvm_support,
        Gate=Gate,
        start_state=start_state,
        wait_for=wait_for,
        PROGRAMS=PROGRAMS,
        PROGRAM_GPA=PROGRAM_GPA,
        DATA_GPA=DATA_GPA,
    )
    for vm in made:
        vm.close()


MANUAL, INITIALLY_SET = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET


@pytest.fixture(params=[MANUAL | INITIALLY_SET, MANUAL, 0], ids=["initially-set", "manual", "automatic"])
def manual_protect(request, kvm_support):
    """What of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 ``kvm-bitmap`` uses; 0: nothing."""
    if request.param & ~kvm_support.capabilities["KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"]:
        pytest.skip("this KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, or less of it")
    return request.param


@pytest.fixture
def make_uffd_log(kvm_support):
    """Makes logs of ``uffd`` over memory without a machine, and closes them; skips where the kernel lacks something.

    The test's writes to the vCPUs' mapping, ``by_vcpu(log, gfn, ...)``, stand for a vCPU's.
    """
    logs = []

    def make(kind, memory_bytes=8 << 20):
        memory = GuestMemory.linear(memory_bytes)
        try:
            check_userfaultfd(kind.features)
            log = kind(VcpuView(memory=memory, mapping=memory.map_again()))
        except UnsupportedError as error:
            pytest.skip(f"{error} ({error.hint})")
        memory.on_write(log.mark)
        logs.append(log)
        return log

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def by_vcpu():
    """Writes pages of a log's view as a vCPU does: without the interpreter lock, which its fault handler needs."""

    def write(log, *gfns):
        for gfn in gfns:
            libc.memset(log._view.hva(gfn), 1, 8)

    return write


@pytest.fixture
def open_descriptors():
    """Returns what is open of userfaultfd, pagemap, eventfd and KVM: ``(name, inheritable)``, sorted."""

    def listed():
        found = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the listing's own
                found.append((os.readlink(f"/proc/self/fd/{fd}"), os.get_inheritable(int(fd))))
        kinds = ("userfaultfd", "pagemap", "eventfd", "kvm")
        return sorted(each for each in found if any(kind in each[0] for kind in kinds))

    return listed
