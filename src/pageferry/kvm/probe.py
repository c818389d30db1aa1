"""Finding out by doing whether this host can run a guest on KVM."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

from pageferry.core.cpu_features import FEATURES
from pageferry.core.cpuid import EXTENDED, NO_SUBLEAF, Leaves, answer, of_vcpu
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import PAGE_SHIFT
from pageferry.kvm import uapi
from pageferry.kvm.fds import DEV_KVM, SystemFd
from pageferry.kvm.trial import DATA_GPA, run_trial, trial_guest, trial_state
from pageferry.kvm.tsc import can_offset_tsc

_ANSWERS_GPA = DATA_GPA + 0x1000
# mov dword [DATA_GPA], 1
_WRITE = b"\xc7\x04\x25" + struct.pack("<II", DATA_GPA, 1)
#: ModRM bytes of ``mov [disp32], r32`` for EAX, EBX, ECX and EDX.
_STORES = (0x04, 0x1C, 0x0C, 0x14)
_ANSWER = struct.Struct("<4I")

_CAPABILITIES = {
    name: value for name, value in vars(uapi).items() if name.startswith("KVM_CAP_") and isinstance(value, int)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmSupport:
    """What this host's KVM offers, each thing seen working.

    ``tsc_offset``: a guest's TSC can be set (some KVMs accept it and go on showing the host's). ``exact_cpuid``: a
    guest that asks CPUID is answered by the table that it was given (some KVMs change the table, and on some CPUs the
    instruction does not even leave the guest).
    ``capabilities`` maps a capability's name to what KVM_CHECK_EXTENSION says of it on a VM (0: not there).
    """

    api_version: int
    tsc_offset: bool
    exact_cpuid: bool
    capabilities: dict[str, int] = field(default_factory=dict)

    @property
    def manual_protect(self) -> bool:
        """Whether the dirty bitmap can be cleared by hand."""
        return bool(self._manual_protect & uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)

    @property
    def initially_set(self) -> bool:
        """Whether logging can start with all bits set and nothing protected."""
        return bool(self._manual_protect & uapi.KVM_DIRTY_LOG_INITIALLY_SET)

    @property
    def _manual_protect(self) -> int:
        return self.capabilities.get("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", 0)


def probe(path: Path = DEV_KVM) -> KvmSupport:
    """Open KVM, make a machine, run a few instructions of a ring-3 guest and see the dirty log notice its write.

    Args:
        path: the device.

    Raises:
        UnsupportedError: something of that does not work here; ``capability`` and ``hint`` say what and what to do.
    """
    with SystemFd(path) as system:
        try:
            with system.create_vm() as vm:
                offered = {name: vm.check_extension(value) for name, value in _CAPABILITIES.items()}
                with vm.create_vcpu(0) as vcpu:
                    tsc_offset = can_offset_tsc(vcpu)
        except VmError as error:
            raise UnsupportedError(
                "kvm-vm",
                "KVM is there but cannot create a VM",
                hint="another hypervisor may hold the CPU; use --accel soft",
            ) from error
    try:
        exact_cpuid = _run_guest()
    except UnsupportedError:
        raise
    except VmError as error:
        raise UnsupportedError(
            "kvm-guest", f"KVM is there but a guest did not run: {error}", hint="use --accel soft"
        ) from error
    return KvmSupport(
        api_version=uapi.KVM_API_VERSION, tsc_offset=tsc_offset, exact_cpuid=exact_cpuid, capabilities=offered
    )


def _questions(table: Leaves) -> list[tuple[int, int]]:
    """Return the leaves and sub-leaves that a table has, and all others that tell of features."""
    own = ((leaf.leaf, 0 if leaf.subleaf == NO_SUBLEAF else leaf.subleaf) for leaf in table)
    return sorted({(0, 0), (EXTENDED, 0), *own, *((leaf, subleaf) for leaf, subleaf, _ in FEATURES)})


def _ask(leaf: int, subleaf: int, at_gpa: int) -> bytes:
    """Return machine code that stores CPUID's answer at ``at_gpa``: mov eax, mov ecx, cpuid, four stores."""
    code = struct.pack("<BIBI", 0xB8, leaf, 0xB9, subleaf) + b"\x0f\xa2"
    return code + b"".join(struct.pack("<3BI", 0x89, modrm, 0x25, at_gpa + 4 * n) for n, modrm in enumerate(_STORES))


def _run_guest() -> bool:
    """Run a guest that writes a page and asks CPUID; return whether the answers are those of its table."""
    with trial_guest(trial_state()) as vm:
        questions = {_ANSWERS_GPA + _ANSWER.size * n: each for n, each in enumerate(_questions(vm.cpuid))}
        asks = b"".join(_ask(*question, at_gpa) for at_gpa, question in questions.items())
        vm.log_dirty.enable()
        run_trial(vm, _WRITE + asks)
        if not vm.log_dirty.clean().test(DATA_GPA >> PAGE_SHIFT):
            raise VmError("its write was not seen by the dirty log")
        given = of_vcpu(vm.cpuid, index=0, cpus=1)
        return all(
            _ANSWER.unpack(vm.memory.read(at_gpa, _ANSWER.size)) == answer(given, *question)
            for at_gpa, question in questions.items()
        )
