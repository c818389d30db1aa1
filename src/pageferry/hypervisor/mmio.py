"""handle_mmio: device space of the guest, as Unicorn meets it.

A page whose P2M type is ``mmio_dm`` gets a TLB entry that points into the *MMIO window*: machine addresses
``MMIO_WINDOW + gpa`` where no memory is. Unicorn calls back for every load and store there, with the value: it is the
instruction emulator that Xen's ``handle_mmio`` has to be by itself. From there the access goes to the device bus.

An access of 8 bytes arrives as two of 4, low half first. A store here must not have an effect: a stop asked for inside
this callback leaves RIP at the store, which would run twice. Effects come from ports, where :mod:`.traps` is exact.

Source: RFC, "If it is MMIO space, call handle_mmio()".
"""

from collections.abc import Callable

from pageferry.core.errors import VmError
from pageferry.devices.bus import DeviceBus
from pageferry.hypervisor.unicorn_api import MMIO_READ, MMIO_WRITE, Engine

#: Where device space appears among machine addresses; far above any frame.
MMIO_WINDOW = 1 << 48
_WINDOW_BYTES = 1 << 47


class MmioWindow:
    """The window of one vCPU.

    Args:
        bus: the devices.
        failed: takes an exception that must not travel through the emulator.
    """

    def __init__(self, bus: DeviceBus, failed: Callable[[BaseException], None]) -> None:
        self._bus = bus
        self._failed = failed
        self._callbacks = (MMIO_READ(self._read), MMIO_WRITE(self._write))

    def attach(self, engine: Engine) -> None:
        """Open the window in one emulator instance; this object must outlive it."""
        engine.mmio_map(MMIO_WINDOW, _WINDOW_BYTES, *self._callbacks)

    def _read(self, _engine: int, gpa: int, size: int, _data: int) -> int:
        try:
            return self._bus.mmio_read(gpa, size)
        except BaseException as error:
            self._failed(error)
            return 0

    def _write(self, _engine: int, gpa: int, size: int, value: int, _data: int) -> None:
        try:
            if self._bus.mmio_write(gpa, size, value) is not None:
                raise VmError(f"a store to device space at gpa {gpa:#x} had an effect", hint="effects need a port")
        except BaseException as error:
            self._failed(error)
