"""The ACPI tables of a PC: how an operating system learns of CPUs, interrupts, PCI and power management.

They lie in RAM from 0xE0000 on, where the root pointer is looked for; the memory map calls that reserved::

    RSDP -> XSDT -> FADT -> FACS, DSDT
                 -> MADT, if there are several CPUs

A PC with one CPU has no MADT: its interrupts are those of the two PICs, wherever it runs. Others have local APICs and
an IOAPIC, whose input n is IRQ n.

Source: ACPI specification 6.5, sections 5.2.3.2 (generic address), 5.2.5 (RSDP), 5.2.8 (XSDT), 5.2.9 (FADT), 5.2.10
(FACS), 5.2.12 (MADT), 6.2.13 (_PRT), 7.3.4 (_S5).
"""

import struct
from collections.abc import Iterator

from pageferry.devices.clock import TIMER_PORT
from pageferry.devices.dma import DMA_MMIO
from pageferry.devices.interrupts import IRQ_COM1, IRQ_RTC, IRQ_SCI, IRQ_TIMER
from pageferry.devices.pc import aml, power
from pageferry.devices.pc.pit import PIT_PORT, SPEAKER_PORT
from pageferry.devices.pci import CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, PCI_WINDOW, SLOTS, irq_of_slot
from pageferry.devices.rtc import CENTURY, RTC_PORT
from pageferry.devices.uart import CONSOLE_PORT

RSDP_GPA = 0xE_0000
_TABLES_GPA = 0xE_0100
#: Of the FACS, 64 bytes are asked for; of the others nothing.
_ALIGNMENT = 64

LAPIC_GPA, IOAPIC_GPA = 0xFEE0_0000, 0xFEC0_0000
_OEM, _TABLE, _CREATOR = b"PFERRY", b"PAGEFERR", b"PFRY"
#: Signature, length, revision, checksum, OEM, table's name and revision, creator and its revision.
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_CHECKSUM_AT = 9

_WBINVD, _C1, _NO_SLEEP_BUTTON, _NO_RTC_WAKE = 1 << 0, 1 << 2, 1 << 5, 1 << 6
_TIMER_OF_32_BITS, _HAS_RESET_PORT = 1 << 8, 1 << 10
_FADT_FLAGS = _WBINVD | _C1 | _NO_SLEEP_BUTTON | _NO_RTC_WAKE | _TIMER_OF_32_BITS | _HAS_RESET_PORT
_LEGACY_DEVICES, _NO_VGA = 1 << 0, 1 << 2
_NO_C2, _NO_C3 = 101, 1001
_IO_SPACE = 1

_HAS_PICS = 1 << 0
_ENABLED = 1 << 0
_LOCAL_APIC, _IOAPIC, _SOURCE_OVERRIDE, _LOCAL_APIC_NMI = 0, 1, 2, 4
_ALL_CPUS, _LINT1 = 0xFF, 1
_LEVEL_ACTIVE_HIGH = 0b1101


def acpi_tables(cpus: int) -> tuple[tuple[int, bytes], ...]:
    """Return the tables of a PC with so many CPUs, as (gpa, bytes), the root pointer at RSDP_GPA first."""
    pieces: list[tuple[int, bytes]] = []

    def put(data: bytes) -> int:
        gpa = -(-(pieces[-1][0] + len(pieces[-1][1])) // _ALIGNMENT) * _ALIGNMENT if pieces else _TABLES_GPA
        pieces.append((gpa, data))
        return gpa

    facs = put(struct.pack("<4sI24xB31x", b"FACS", 64, 2))
    dsdt = put(_table(b"DSDT", 2, _dsdt()))
    tables = [put(_table(b"FACP", 6, _fadt(facs, dsdt)))]
    if cpus > 1:
        tables.append(put(_table(b"APIC", 5, b"".join(_madt(cpus)))))
    xsdt = put(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    return (RSDP_GPA, _rsdp(xsdt)), *pieces


def _rsdp(xsdt_gpa: int) -> bytes:
    revision, no_rsdt, length = 2, 0, 36
    rsdp = struct.pack("<8sB6sBIIQBxxx", b"RSD PTR ", 0, _OEM, revision, no_rsdt, length, xsdt_gpa, 0)
    rsdp = rsdp[:8] + _checksum(rsdp[:20]) + rsdp[9:]
    return rsdp[:32] + _checksum(rsdp) + rsdp[33:]


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    table = _HEADER.pack(signature, length, revision, 0, _OEM, _TABLE, 1, _CREATOR, 1) + body
    return table[:_CHECKSUM_AT] + _checksum(table) + table[_CHECKSUM_AT + 1 :]


def _checksum(data: bytes) -> bytes:
    """Return the byte that makes the sum of ``data`` 0, in which it is 0 as yet."""
    return bytes((-sum(data) & 0xFF,))


# -- fixed hardware ----------------------------------------------------------------------------------------------------


def _fadt(facs_gpa: int, dsdt_gpa: int) -> bytes:
    blocks = struct.pack("<IIIIIIII", power.PM_EVENT_PORT, 0, power.PM_CONTROL_PORT, 0, 0, power.PM_TIMER_PORT, 0, 0)
    block_sizes = bytes((4, 2, 0, 4, 0, 0, 0))
    idle = struct.pack("<BHHHHBBBBB", 0, _NO_C2, _NO_C3, 0, 0, 0, 0, 0, 0, CENTURY)
    generic = (
        _io_address(power.PM_EVENT_PORT, 32),
        _NOWHERE,
        _io_address(power.PM_CONTROL_PORT, 16),
        _NOWHERE,
        _NOWHERE,
        _io_address(power.PM_TIMER_PORT, 32),
        *[_NOWHERE] * 4,
    )
    return b"".join(
        (
            struct.pack("<IIxBHIBBBB", facs_gpa, dsdt_gpa, 0, IRQ_SCI, 0, 0, 0, 0, 0),  # ACPI mode always: no SMI
            blocks,
            block_sizes,
            idle,
            struct.pack("<HxI", _LEGACY_DEVICES | _NO_VGA, _FADT_FLAGS),
            _io_address(power.RESET_PORT, 8),
            struct.pack("<BHB", power.RESET_VALUE, 0, 5),
            struct.pack("<QQ", 0, dsdt_gpa),
            *generic,
            bytes(8),  # no hypervisor's vendor
        )
    )


def _io_address(port: int, bits: int) -> bytes:
    return struct.pack("<BBBBQ", _IO_SPACE, bits, 0, {8: 1, 16: 2, 32: 3}[bits], port)


_NOWHERE = bytes(12)


def _madt(cpus: int) -> Iterator[bytes]:
    yield struct.pack("<II", LAPIC_GPA, _HAS_PICS)
    for number in range(cpus):
        yield struct.pack("<BBBBI", _LOCAL_APIC, 8, number, number, _ENABLED)
    yield struct.pack("<BBBxII", _IOAPIC, 12, 0, IOAPIC_GPA, 0)
    yield struct.pack("<BBBBIH", _SOURCE_OVERRIDE, 10, 0, IRQ_SCI, IRQ_SCI, _LEVEL_ACTIVE_HIGH)
    yield struct.pack("<BBBHB", _LOCAL_APIC_NMI, 6, _ALL_CPUS, 0, _LINT1)


# -- devices -----------------------------------------------------------------------------------------------------------


def _dsdt() -> bytes:
    devices = (
        _isa_device("TIMR", "PNP0100", aml.io(PIT_PORT, 4), aml.irq(IRQ_TIMER)),
        _isa_device("SPKR", "PNP0800", aml.io(SPEAKER_PORT, 1)),
        _isa_device("RTC", "PNP0B00", aml.io(RTC_PORT, 2), aml.irq(IRQ_RTC)),
        _isa_device("COM1", "PNP0501", aml.io(CONSOLE_PORT, 8), aml.irq(IRQ_COM1)),
        _isa_device("MBRD", "PNP0C02", *_motherboard()),
    )
    sleep_type = aml.integer(power.SLEEP_TYPE_S5)
    s5 = aml.name("\\_S5", aml.package(sleep_type, sleep_type, aml.integer(0), aml.integer(0)))
    return aml.scope("\\_SB", _pci_root(), *devices) + s5


def _isa_device(name: str, hid: str, *descriptors: bytes) -> bytes:
    return aml.device(name, aml.name("_HID", aml.eisa_id(hid)), aml.name("_CRS", aml.resources(*descriptors)))


def _motherboard() -> tuple[bytes, ...]:
    """Return what no driver may be given: power management, and the devices of the guest ABI."""
    power_ports = power.PM_TIMER_PORT + 4 - power.PM_EVENT_PORT
    abi = aml.io(TIMER_PORT, 0xF8 - TIMER_PORT), aml.memory(DMA_MMIO, 0x1000)
    return aml.io(power.PM_EVENT_PORT, power_ports), *abi


def _pci_root() -> bytes:
    configuration = aml.io(CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT + 4 - CONFIG_ADDRESS_PORT)
    windows = (
        aml.bus_range(0, 0),
        configuration,
        aml.io_range(range(CONFIG_ADDRESS_PORT)),
        aml.io_range(range(CONFIG_DATA_PORT + 4, 0x1_0000)),
        aml.memory_range(PCI_WINDOW),
    )
    routes = (_route(slot) for slot in range(1, SLOTS))
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(*windows)),
        aml.name("_PRT", aml.package(*routes)),
    )


def _route(slot: int) -> bytes:
    """Return where INTA# of a slot's functions leads: to a global interrupt, which is the IRQ."""
    any_function, pin_a, no_link = slot << 16 | 0xFFFF, 0, 0
    return aml.package(*map(aml.integer, (any_function, pin_a, no_link, irq_of_slot(slot))))
