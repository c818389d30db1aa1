"""PcChips: interrupt controllers and timer of a PC whose CPU is software; on a real CPU they are the kernel's.

This machine has no IOAPIC and no local APIC: a guest that relies on one all the same, as test kernels may, ends at its
first store there, rather than wait for an interrupt that never comes. A guest that has left those of another machine
alone, as one with a single CPU does that was told of none, can come here, and go back.
"""

import struct
from collections.abc import Callable

from pageferry.core.errors import GuestCrash, UnsupportedError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.run import Effect
from pageferry.devices.bus import DeviceBus, expect_size
from pageferry.devices.clock import Clock
from pageferry.devices.interrupts import IRQ_TIMER
from pageferry.devices.pc.pic import PicPair
from pageferry.devices.pc.pit import Pit, SpeakerPort

_IOAPIC_GPA, _LAPIC_GPA = 0xFEC0_0000, 0xFEE0_0000
_MASKED = 1 << 16
#: Where it is; its index register, its id, the levels of its inputs, padding; its redirection entries.
_IOAPIC_STATE = struct.Struct("<Q16s24Q")
_UNUSED_ENTRIES = (_MASKED,) * 24


class PcChips:
    """Both interrupt controllers and the timer, on the bus; what the vCPU asks of them (:class:`CpuInterrupts`).

    Args:
        bus: gets the chips; its interrupt lines lead to them.
        clock: guest time.
    """

    def __init__(self, bus: DeviceBus, clock: Clock) -> None:
        self._bus = bus
        self._pics = PicPair()
        pit = Pit(clock.now_ns, bus.lines.line(IRQ_TIMER))
        bus.add(*self._pics.chips, pit)
        bus.elsewhere += (UnusedIoapic(),)
        bus.add_regions(self._pics.elcr, SpeakerPort(pit), MissingLapic())
        bus.timed += (pit,)
        bus.lines.connect(self._pics)

    @property
    def pending(self) -> bool:
        """Whether an interrupt is requested; any thread, no lock."""
        return self._pics.pending

    @property
    def on_raise(self) -> Callable[[], None]:
        """Called when ``pending`` becomes true, on any thread and with the bus's lock held."""
        return self._pics.on_raise

    @on_raise.setter
    def on_raise(self, call: Callable[[], None]) -> None:
        self._pics.on_raise = call

    def acknowledge(self) -> int:
        """Take the interrupt and return its vector."""
        with self._bus.locked():
            return self._pics.acknowledge()


class MissingLapic:
    """The local APIC that this machine lacks, where a guest would look for it: reads give ones."""

    ports = range(0)
    mmio = range(_LAPIC_GPA, _LAPIC_GPA + PAGE_SIZE)

    def read(self, offset: int, size: int) -> int:
        """Return what is read where nothing is."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """End the guest.

        Raises:
            GuestCrash: always.
        """
        raise GuestCrash(f"store to register {offset:#x} of a local APIC, which the software machine does not have")


class UnusedIoapic:
    """The IOAPIC that this machine lacks, in the saved state: as after reset, and nothing else is taken."""

    name = "ioapic"

    def save(self) -> bytes:
        """Return KVM's structure of an IOAPIC after reset."""
        return _IOAPIC_STATE.pack(_IOAPIC_GPA, bytes(16), *_UNUSED_ENTRIES)

    def load(self, data: bytes) -> None:
        """Accept one that the guest has not used.

        Raises:
            VmError: it is not one of an IOAPIC.
            UnsupportedError: the guest uses it.
        """
        expect_size(self.name, data, _IOAPIC_STATE.size)
        _, _, *entries = _IOAPIC_STATE.unpack(data)
        if tuple(entries) != _UNUSED_ENTRIES:
            raise UnsupportedError("ioapic", "the guest uses its IOAPIC, which the software machine lacks")
