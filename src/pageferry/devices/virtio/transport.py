"""The PCI transport of one virtio device: modern, interrupts by INTA#, a configuration that drivers only read.

BAR 0 has four pages, each named by a capability of the vendor's kind:

======  ==================================================================================
offset  content
======  ==================================================================================
0x0000  common configuration (section 4.1.4.3)
0x1000  ISR status: bit 0 a queue was used, bit 1 configuration; reading clears it (4.1.4.5)
0x2000  the device's own configuration (4.1.4.6)
0x3000  notifications: queue n at 4 n (4.1.4.4)
======  ==================================================================================

A driver that breaks the rules ends its device: DEVICE_NEEDS_RESET is set, and the device touches no memory until the
driver has reset it.

Source: VIRTIO 1.2, sections 2.1 to 2.4, 4.1.
"""

import logging
from collections.abc import Callable
from struct import Struct
from struct import error as StructError
from typing import TypeVar

from pageferry.core.errors import VmError
from pageferry.core.run import Effect
from pageferry.devices.doorbells import Doorbells
from pageferry.devices.interrupts import Line
from pageferry.devices.pci import CONFIG_BYTES, ConfigSpace
from pageferry.devices.virtio.model import Driver, VirtioModel
from pageferry.devices.virtio.queue import SplitQueue

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

VENDOR_ID = 0x1AF4
_FIRST_DEVICE_ID = 0x1040
_REVISION = 1

INDIRECT_DESC, EVENT_IDX, VERSION_1 = 28, 29, 32
_TRANSPORT_FEATURES = 1 << INDIRECT_DESC | 1 << EVENT_IDX | 1 << VERSION_1

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
_DRIVERS_STATUS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

_ISR_QUEUE, _ISR_CONFIG = 1, 2
_NO_VECTOR = 0xFFFF

_PAGE = 0x1000
COMMON, ISR, DEVICE, NOTIFY = 0 * _PAGE, 1 * _PAGE, 2 * _PAGE, 3 * _PAGE
_BAR_BYTES = 4 * _PAGE
NOTIFY_STRIDE = 4

#: cap_vndr, cap_next, cap_len, cfg_type, bar, id, padding, offset, length (section 4.1.4).
_CAPABILITY = Struct("<5B3xII")
_CAP_VENDOR = 0x09
_CFG_COMMON, _CFG_NOTIFY, _CFG_ISR, _CFG_DEVICE, _CFG_PCI = 1, 2, 3, 4, 5
_COMMON_BYTES = 0x3C

#: Fields of the common configuration: offset, size, name (section 4.1.4.3). Those after ``queue_select`` are of the
#: queue that it names.
_FIELDS = (
    (0x00, 4, "device_feature_select"),
    (0x04, 4, "device_feature"),
    (0x08, 4, "driver_feature_select"),
    (0x0C, 4, "driver_feature"),
    (0x10, 2, "config_msix_vector"),
    (0x12, 2, "num_queues"),
    (0x14, 1, "device_status"),
    (0x15, 1, "config_generation"),
    (0x16, 2, "queue_select"),
    (0x18, 2, "queue_size"),
    (0x1A, 2, "queue_msix_vector"),
    (0x1C, 2, "queue_enable"),
    (0x1E, 2, "queue_notify_off"),
    (0x20, 8, "queue_desc"),
    (0x28, 8, "queue_driver"),
    (0x30, 8, "queue_device"),
    (0x38, 2, "queue_notify_data"),
    (0x3A, 2, "queue_reset"),
)
_FIELD_AT = {at: (start, size, name) for start, size, name in _FIELDS for at in range(start, start + size)}
_AREAS = {"queue_desc": "descriptors", "queue_driver": "driver", "queue_device": "device"}

_STATE_VERSION = 1
#: version, status, isr, queues; queue_select; the two feature selects; the features in use; length of the rest.
_HEAD = Struct("<4BHIIQI")
#: size, next_available, next_used, signalled, enabled; the three areas.
_QUEUE = Struct("<5H3Q")


def _capabilities(config_bytes: int) -> tuple[bytes, ...]:
    def capability(kind: int, offset: int, size_bytes: int, more: bytes = b"") -> bytes:
        return _CAPABILITY.pack(_CAP_VENDOR, 0, _CAPABILITY.size + len(more), kind, 0, offset, size_bytes) + more

    return (
        capability(_CFG_COMMON, COMMON, _COMMON_BYTES),
        capability(_CFG_ISR, ISR, 1),
        *([capability(_CFG_DEVICE, DEVICE, config_bytes)] if config_bytes else []),
        capability(_CFG_NOTIFY, NOTIFY, _PAGE, NOTIFY_STRIDE.to_bytes(4, "little")),
        capability(_CFG_PCI, 0, 0, bytes(4)),
    )


class VirtioPci:
    """One virtio device in its PCI slot: a :class:`~pageferry.devices.bus.Device` and a PCI function.

    Args:
        model: what kind of device it is.
        queues: of the model's sizes.
        bar_gpa: where its BAR is at first.
        irq: the ISA IRQ that its line leads to.
        line: INTA#, high while it asks for an interrupt.
    """

    ports = range(0)

    def __init__(
        self, model: VirtioModel, queues: tuple[SplitQueue, ...], *, bar_gpa: int, irq: int, line: Line
    ) -> None:
        self.name = model.name
        self.model = model
        self.driver = Driver(0, queues)
        self._line = line
        self._offered = model.features | _TRANSPORT_FEATURES
        capabilities = _capabilities(len(model.config))
        device_id = _FIRST_DEVICE_ID + model.device_id
        self._config = ConfigSpace(
            ids=(VENDOR_ID, device_id),
            subsystem=(VENDOR_ID, device_id),
            class_code=model.pci_class,
            revision=_REVISION,
            bar_bytes=_BAR_BYTES,
            bar_gpa=bar_gpa,
            irq=irq,
            capabilities=capabilities,
            writable=[bytes(len(c)) for c in capabilities[:-1]] + [bytes(4) + b"\xff" + bytes(3) + b"\xff" * 8],
        )
        self._window = self._config.capabilities[-1]
        self.mmio = self._config.bar
        self._isr = 0
        self._level = False
        self._complained = False
        self._doorbells: Doorbells | None = None
        self._event = -1
        self._bells: tuple[int, ...] = ()
        self._reset()

    # -- the guest's accesses ------------------------------------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> int:
        """Return a register of the configuration space; the last capability's is a window onto the BAR (4.1.4.9)."""
        if self._in_window(offset, size):
            at, length = self._window_target()
            return self.read(at, length) if length else 0
        return self._config.read(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Set a register of the configuration space."""
        if self._in_window(offset, size):
            at, length = self._window_target()
            if length:
                self.write(at, length, value & (1 << 8 * length) - 1)
            return
        self._config.write(offset, size, value)
        self.mmio = self._config.bar
        self._place_bells()
        self._drive()

    def _in_window(self, offset: int, size: int) -> bool:
        return offset == self._window + _CAPABILITY.size and size in (1, 2, 4)

    def _window_target(self) -> tuple[int, int]:
        """Return offset and size of the access that the window makes; a size of 0: none."""
        bar = self._config.get(self._window + 4, 1)
        offset = self._config.get(self._window + 8, 4)
        length = self._config.get(self._window + 12, 4)
        fits = bar == 0 and length in (1, 2, 4) and offset % length == 0 and offset + length <= _BAR_BYTES
        return (offset, length) if fits else (0, 0)

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads in the BAR."""
        area, at = offset & -_PAGE, offset % _PAGE
        if area == COMMON:
            return self._read_common(at, size)
        if area == ISR and at == 0:
            isr, self._isr = self._isr, 0
            self._drive()
            return isr
        if area == DEVICE:
            return int.from_bytes(self.model.config[at : at + size], "little")
        return 0

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Take what the guest writes in the BAR."""
        area, at = offset & -_PAGE, offset % _PAGE
        if area == NOTIFY:
            self.serve(at // NOTIFY_STRIDE)
        elif area == COMMON:
            self._write_common(at, size, value)
        return None

    # -- common configuration ------------------------------------------------------------------------------------------

    def _read_common(self, at: int, size: int) -> int:
        start, _, name = _FIELD_AT.get(at, (at, 0, ""))
        return self._get(name) >> 8 * (at - start) & (1 << 8 * size) - 1

    def _write_common(self, at: int, size: int, value: int) -> None:
        start, length, name = _FIELD_AT.get(at, (at, 0, ""))
        if at - start + size > length:
            return
        shift = 8 * (at - start)
        kept = self._get(name) & ~((1 << 8 * size) - 1 << shift)
        self._set(name, kept | value << shift)

    def _queue(self) -> SplitQueue | None:
        return self.driver.queues[self._select] if self._select < len(self.driver.queues) else None

    def _get(self, name: str) -> int:
        queue = self._queue()
        match name:
            case "device_feature_select":
                return self._device_select
            case "device_feature":
                return self._offered >> 32 * self._device_select & 0xFFFF_FFFF if self._device_select < 2 else 0
            case "driver_feature_select":
                return self._driver_select
            case "driver_feature":
                return self.driver.features >> 32 * self._driver_select & 0xFFFF_FFFF if self._driver_select < 2 else 0
            case "config_msix_vector" | "queue_msix_vector":
                return _NO_VECTOR
            case "num_queues":
                return len(self.driver.queues)
            case "device_status":
                return self._status
            case "queue_select":
                return self._select
            case "queue_size" if queue is not None:
                return queue.size
            case "queue_enable" if queue is not None:
                return int(queue.enabled)
            case "queue_notify_off" if queue is not None:
                return self._select
            case "queue_desc" | "queue_driver" | "queue_device" if queue is not None:
                area: int = getattr(queue, _AREAS[name])
                return area
        return 0

    def _set(self, name: str, value: int) -> None:
        match name:
            case "device_feature_select":
                self._device_select = value
            case "driver_feature_select":
                self._driver_select = value
            case "driver_feature" if self._driver_select < 2 and not self._status & FEATURES_OK:
                shift = 32 * self._driver_select
                self.driver.features = self.driver.features & ~(0xFFFF_FFFF << shift) | value << shift
            case "device_status":
                self._set_status(value)
            case "queue_select":
                self._select = value
            case _:
                queue = self._queue()
                if queue is not None and not queue.enabled:
                    self._set_queue(queue, name, value)

    def _set_queue(self, queue: SplitQueue, name: str, value: int) -> None:
        if name in _AREAS:
            setattr(queue, _AREAS[name], value)
        elif name == "queue_size":
            if 0 < value <= queue.max_size and not value & value - 1:
                queue.size = value
            else:
                self._end(f"a queue of {value} entries")
        elif name == "queue_enable" and value == 1:
            queue.enabled = True

    def _set_status(self, value: int) -> None:
        """Take the device status field: the driver sets bits, or resets the device by 0 (sections 2.1, 2.4, 3.1)."""
        if value == 0:
            self._reset()
            return
        before = self._status
        self._status |= value & _DRIVERS_STATUS
        if self._status & ~before & FEATURES_OK:
            if self._acceptable(self.driver.features):
                self._apply_features()
            else:
                self._status &= ~FEATURES_OK
        if self._status & ~before & DRIVER_OK:
            self._place_bells()
            for index in range(len(self.driver.queues)):  # what was made available before
                self.serve(index)

    def _acceptable(self, features: int) -> bool:
        return not features & ~self._offered and bool(features >> VERSION_1 & 1)

    def _apply_features(self) -> None:
        for queue in self.driver.queues:
            queue.event_idx, queue.indirect = self.driver.has(EVENT_IDX), self.driver.has(INDIRECT_DESC)

    def _reset(self) -> None:
        self._status = self._select = self._device_select = self._driver_select = 0
        self.driver.features = 0
        for queue in self.driver.queues:
            queue.reset()
        self.model.reset()
        self._isr = 0
        self._place_bells()
        self._drive()

    # -- notifications -------------------------------------------------------------------------------------------------

    def use_doorbells(self, doorbells: Doorbells, event: int) -> None:
        """Have notifications of any queue signal an eventfd at which the device's thread sleeps; before anything runs.

        They come to the bus all the same while no driver runs the device, and where the machine refuses.
        """
        self._doorbells, self._event = doorbells, event
        self._place_bells()

    def _place_bells(self) -> None:
        """Have the bells where the driver notifies now."""
        if self._doorbells is None:
            return
        notified = range(self.mmio.start + NOTIFY, self.mmio.stop, NOTIFY_STRIDE) if self._status & DRIVER_OK else ()
        bells = tuple(notified[: len(self.driver.queues)])
        if bells == self._bells:
            return
        for gpa in self._bells:
            self._doorbells.remove(gpa, self._event)
        self._bells = tuple(gpa for gpa in bells if self._doorbells.install(gpa, self._event))

    # -- work and interrupts -------------------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether the device may touch memory: a driver runs it, and neither has given up the other."""
        running = self._status & (DRIVER_OK | FEATURES_OK | FAILED | NEEDS_RESET) == DRIVER_OK | FEATURES_OK
        return running and self._config.bus_master

    def serve(self, index: int) -> None:
        """Have the device do what there is to do with a queue, and interrupt its driver if that is wanted."""
        self.work(index, lambda _: self.model.serve(index, self.driver))

    def work(self, index: int, work: Callable[[SplitQueue], _Result]) -> _Result | None:
        """Have something done with a queue, and interrupt its driver if that is wanted; the bus is locked.

        Returns:
            None: nothing was done, for no driver runs the queue; or the driver has broken the rules, as a VmError of
            ``work`` says, and its device has ended.
        """
        if not self.live or index >= len(self.driver.queues) or not self.driver.queues[index].enabled:
            return None
        try:
            result = work(self.driver.queues[index])
            wanted = False
            for queue in self.driver.queues:
                if queue.enabled and queue.wants_interrupt():
                    wanted = True
        except VmError as error:
            self._end(str(error))
            return None
        if wanted:
            self._interrupt(_ISR_QUEUE)
        return result

    def _end(self, why: str) -> None:
        """Touch no memory until the driver has reset the device (section 2.1.2)."""
        if not self._complained:  # once: a guest that goes on so fills no log
            _log.warning("%s: its driver broke the rules, and must reset it: %s", self.name, why)
            self._complained = True
        self._status |= NEEDS_RESET
        if self._status & DRIVER_OK:
            self._interrupt(_ISR_CONFIG)

    def _interrupt(self, cause: int) -> None:
        self._isr |= cause
        self._drive()

    def _drive(self) -> None:
        self._config.pending = self._isr != 0
        level = self._config.intx
        if level != self._level:
            self._level = level
            self._line(level)

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return the transport's registers, the queues, and what is the model's own."""
        queues, own = self.driver.queues, self.model.save()
        selects = (self._select, self._device_select, self._driver_select)
        head = _HEAD.pack(
            _STATE_VERSION, self._status, self._isr, len(queues), *selects, self.driver.features, len(own)
        )
        return head + self._config.save() + b"".join(map(_pack_queue, queues)) + own

    def load(self, data: bytes) -> None:
        """Replace them; the line is driven as it was.

        Raises:
            VmError: it is not a state of this device.
        """
        try:
            self._load(data)
        except StructError as error:
            raise VmError(f"the state of device {self.name} is cut") from error

    def _load(self, data: bytes) -> None:
        version, status, isr, count, select, device_select, driver_select, features, own_bytes = _HEAD.unpack_from(data)
        config_at = _HEAD.size
        queues_at = config_at + CONFIG_BYTES
        own_at = queues_at + _QUEUE.size * count
        if version != _STATE_VERSION:
            raise VmError(f"the state of device {self.name} has version {version}, not {_STATE_VERSION}")
        if count != len(self.driver.queues) or len(data) != own_at + own_bytes:
            raise VmError(f"the state of device {self.name} has {len(data)} bytes and {count} queues")
        if status & ~(_DRIVERS_STATUS | NEEDS_RESET) or isr & ~(_ISR_QUEUE | _ISR_CONFIG):
            raise VmError(f"the state of device {self.name} has registers that it cannot have")
        if status & FEATURES_OK and not self._acceptable(features):
            raise VmError(f"the guest uses features of device {self.name} that it lacks here: {features:#x}")
        saved = [_QUEUE.unpack_from(data, queues_at + _QUEUE.size * n) for n in range(count)]
        for queue, (size, *_, enabled, _, _, _) in zip(self.driver.queues, saved, strict=True):
            if not 0 < size <= queue.max_size or size & size - 1 or enabled > 1:
                raise VmError(f"the state of device {self.name} has a queue that it cannot have")
        self.model.load(data[own_at:])
        self._config.load(data[config_at:queues_at])
        self._status, self._isr = status, isr
        self._select, self._device_select, self._driver_select = select, device_select, driver_select
        self.driver.features = features
        for queue, values in zip(self.driver.queues, saved, strict=True):
            queue.size, queue.next_available, queue.next_used, queue.signalled, enabled, *areas = values
            queue.enabled = bool(enabled)
            queue.descriptors, queue.driver, queue.device = areas
        if status & FEATURES_OK:
            self._apply_features()
        self.mmio = self._config.bar
        self._place_bells()
        self._drive()


def _pack_queue(queue: SplitQueue) -> bytes:
    return _QUEUE.pack(
        queue.size,
        queue.next_available,
        queue.next_used,
        queue.signalled,
        queue.enabled,
        queue.descriptors,
        queue.driver,
        queue.device,
    )
