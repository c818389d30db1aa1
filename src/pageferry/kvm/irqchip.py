"""The interrupt controllers and the timer that KVM has inside the kernel: two PICs, an IOAPIC, a PIT.

Guest accesses never leave the kernel; here their states are saved and restored, with the devices' and in this order,
after all vCPUs: PICs and IOAPIC pass what is pending on to the local APICs, and the PIT begins to tick.

A state is the kernel's own structure, little-endian, with two changes: what an IOAPIC or a PIT has as padding is left
out as zeros; and where the PIT has times of this host at which counters were loaded, there is for how long each has
counted (see devices/pc/pit.py). KVM does not tell that of counter 0, so all of its counters begin anew elsewhere: what
ticks once does so later than it would have, and twice if it has already. Nor does KVM take it: what ticks once is
loaded with the rest of its count. The count of ticks that KVM still owes the guest is nowhere to be read, and ends with
the machine.

Source: kernel ``api.rst``: KVM_CREATE_IRQCHIP, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_CREATE_PIT2, KVM_GET_PIT2,
KVM_SET_PIT2; Intel 8259A, 8254 and 82093AA data sheets.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import PIC_NAME
from pageferry.devices.bus import Stateful, expect_size
from pageferry.devices.interrupts import ELCR_AT_START, IRQS
from pageferry.devices.pc.pit import PIT_HZ
from pageferry.kvm import uapi
from pageferry.kvm.fds import VmFd

_REQUIRED = {
    "KVM_CAP_IRQCHIP": uapi.KVM_CAP_IRQCHIP,
    "KVM_CAP_MP_STATE": uapi.KVM_CAP_MP_STATE,
    "KVM_CAP_PIT2": uapi.KVM_CAP_PIT2,
    "KVM_CAP_PIT_STATE2": uapi.KVM_CAP_PIT_STATE2,
}
_IOAPIC_GPA = 0xFEC0_0000
_ELCR_MASKS = {uapi.KVM_IRQCHIP_PIC_MASTER: 0xF8, uapi.KVM_IRQCHIP_PIC_SLAVE: 0xDE}
# field -> highest value, where not all of its bits are free
_PIC_LIMITS = {"priority_add": 7, "init_state": 3} | dict.fromkeys(
    ("read_reg_select", "poll", "special_mask", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested_mode", "init4"),
    1,
)
_IOAPIC_LIMITS = {"ioregsel": 0xFF, "id": 0xF, "irr": 0xFF_FFFF, "pad": 0}
_PIT_LIMITS = {
    "count": 1 << 16,
    "count_latched": 4,
    "status_latched": 1,
    "read_state": 4,
    "write_state": 4,
    "rw_mode": 3,
    "bcd": 1,
    "gate": 1,
}
_PIT_MODES = (0, 1, 2, 3, 4, 5, 0xFF)  # the last: not programmed yet
_PIT_ONE_SHOT = (0, 4)
_PIT_FLAGS = 3
_NS_PER_S = 1_000_000_000
#: In place of the time of loading: a counter that waits for its count; see devices/pc/pit.py.
_PIT_WAITS = -1
#: What tells KVM that the input of an IRQ is low, and that it is high.
_LEVELS = [[uapi.KvmIrqLevel(irq=irq, level=level) for level in (False, True)] for irq in range(IRQS)]


def create_irqchip(vm: VmFd) -> tuple[Stateful, ...]:
    """Give a machine that has no vCPUs yet its interrupt controllers and PIT; return them, in the order of restoring.

    Raises:
        UnsupportedError: this KVM lacks one of them.
        KvmError: the kernel refused.
    """
    for name, capability in _REQUIRED.items():
        if not vm.check_extension(capability):
            raise UnsupportedError("machine", f"this KVM lacks {name}", hint="use --machine plain")
    vm.ioctl(uapi.KVM_CREATE_IRQCHIP)
    vm.ioctl(uapi.KVM_CREATE_PIT2, uapi.KvmPitConfig(flags=uapi.KVM_PIT_SPEAKER_DUMMY))
    pics = {PIC_NAME: uapi.KVM_IRQCHIP_PIC_MASTER, "pic1": uapi.KVM_IRQCHIP_PIC_SLAVE}
    for chip_id in pics.values():
        box = uapi.KvmIrqchip(chip_id=chip_id)
        vm.ioctl(uapi.KVM_GET_IRQCHIP, box)
        box.chip.pic.elcr = ELCR_AT_START >> 8 * chip_id & 0xFF
        vm.ioctl(uapi.KVM_SET_IRQCHIP, box)
    return (
        *(_Chip(name, vm, chip_id, "pic", _pic_faults) for name, chip_id in pics.items()),
        _Chip("ioapic", vm, uapi.KVM_IRQCHIP_IOAPIC, "ioapic", _ioapic_faults),
        _Pit(vm),
    )


@dataclass(frozen=True, slots=True)
class KvmInterrupts:
    """The inputs of KVM's controllers: IRQ n is input n of the PICs and of the IOAPIC.

    Implements :class:`pageferry.devices.interrupts.InterruptController`.

    Args:
        vm: a machine that has them.
    """

    vm: VmFd

    def set_line(self, irq: int, level: bool) -> None:
        """Drive an input.

        Raises:
            KvmError: the kernel refused.
        """
        self.vm.ioctl(uapi.KVM_IRQ_LINE, _LEVELS[irq][level])


@dataclass(frozen=True, slots=True)
class _Chip:
    """One of the chips of KVM_GET_IRQCHIP.

    ``member``: where it is in the union. ``faults``: tells what is wrong with a state; "" if nothing.
    """

    name: str
    vm: VmFd
    chip_id: int
    member: str
    faults: Callable[[int, ctypes.Structure], str]

    def save(self) -> bytes:
        """Return the chip's structure."""
        box = uapi.KvmIrqchip(chip_id=self.chip_id)
        self.vm.ioctl(uapi.KVM_GET_IRQCHIP, box)
        state = getattr(box.chip, self.member)
        return bytes(state)

    def load(self, data: bytes) -> None:
        """Replace the chip's state; what is pending goes on from here.

        Raises:
            VmError: it is not one of this chip.
            KvmError: the kernel refused.
        """
        box = uapi.KvmIrqchip(chip_id=self.chip_id)
        state = getattr(box.chip, self.member)
        _fill(self.name, state, data)
        _refuse(self.name, self.faults(self.chip_id, state))
        self.vm.ioctl(uapi.KVM_SET_IRQCHIP, box)


@dataclass(frozen=True, slots=True)
class _Pit:
    vm: VmFd
    name: str = "pit"

    def save(self) -> bytes:
        """Return the PIT's structure, with counters that begin anew."""
        state = uapi.KvmPitState2()
        self.vm.ioctl(uapi.KVM_GET_PIT2, state)
        for channel in state.channels:
            channel.count_load_time = 0
        return bytes(state)

    def load(self, data: bytes) -> None:
        """Replace the PIT's state; see the module's text.

        Raises:
            VmError: it is not one of a PIT.
            KvmError: the kernel refused.
        """
        state = uapi.KvmPitState2()
        _fill(self.name, state, data)
        _refuse(self.name, _pit_faults(state))
        for channel in state.channels:
            if channel.mode in _PIT_ONE_SHOT:
                counted = max(channel.count_load_time, 0) * PIT_HZ // _NS_PER_S
                channel.count = max(channel.count - counted, 1)
            channel.count_load_time = 0
        self.vm.ioctl(uapi.KVM_SET_PIT2, state)


def _fill(name: str, state: ctypes.Structure, data: bytes) -> None:
    size = ctypes.sizeof(state)
    expect_size(name, data, size)
    ctypes.memmove(ctypes.addressof(state), data, size)


def _refuse(name: str, fault: str) -> None:
    if fault:
        raise VmError(f"the state of device {name} cannot be: {fault}")


def _above(state: ctypes.Structure, limits: dict[str, int]) -> str:
    for field, most in limits.items():
        value = getattr(state, field)
        if not 0 <= value <= most:
            return f"{field} is {value:#x}, more than {most:#x}"
    return ""


def _pic_faults(chip_id: int, pic: ctypes.Structure) -> str:
    mask, expected = pic.elcr_mask, _ELCR_MASKS[chip_id]
    return _above(pic, _PIC_LIMITS) or ("" if mask == expected else f"elcr_mask is {mask:#x}, not {expected:#x}")


def _ioapic_faults(_: int, ioapic: ctypes.Structure) -> str:
    gpa = ioapic.base_address
    return _above(ioapic, _IOAPIC_LIMITS) or ("" if gpa == _IOAPIC_GPA else f"it is at {gpa:#x}, not {_IOAPIC_GPA:#x}")


def _pit_faults(pit: uapi.KvmPitState2) -> str:
    for channel in pit.channels:
        fault = _above(channel, _PIT_LIMITS)
        if fault or channel.mode not in _PIT_MODES:
            return fault or f"mode is {channel.mode}"
        if channel.count_load_time < _PIT_WAITS:
            return f"count_load_time is {channel.count_load_time}"
    return "a flag or reserved field is not 0" if pit.flags & ~_PIT_FLAGS or any(pit.reserved) else ""
