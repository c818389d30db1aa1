"""The ACPI tables: found and summed as an operating system does it, and read by ACPICA's own tools where they are."""

import itertools
import re
import shutil
import struct
import subprocess

import pytest

from pageferry.devices.pc import aml
from pageferry.devices.pc.acpi import RSDP_GPA, acpi_tables

HEADER = 36


class Memory:
    """Where the tables were put."""

    def __init__(self, cpus):
        self.pieces = acpi_tables(cpus)

    def read(self, gpa, size):
        for start, data in self.pieces:
            if start <= gpa and gpa + size <= start + len(data):
                return data[gpa - start : gpa - start + size]
        raise AssertionError(f"nothing at {gpa:#x}")

    def table(self, gpa):
        (length,) = struct.unpack("<I", self.read(gpa + 4, 4))
        table = self.read(gpa, length)
        assert sum(table) % 256 == 0
        return table

    def tables(self):
        """Follow the pointers as ACPI's section 5.2 has them."""
        rsdp = self.read(RSDP_GPA, 36)
        assert rsdp[:8] == b"RSD PTR "
        assert (sum(rsdp[:20]) % 256, sum(rsdp) % 256, rsdp[15]) == (0, 0, 2)
        xsdt = self.table(struct.unpack("<Q", rsdp[24:32])[0])
        found = [self.table(gpa) for (gpa,) in struct.iter_unpack("<Q", xsdt[HEADER:])]
        return {table[:4].decode(): table for table in (xsdt, *found)}


def test_every_table_is_found_below_1_mib_and_none_overlaps():
    for cpus in (1, 8):
        places = sorted((gpa, gpa + len(data)) for gpa, data in acpi_tables(cpus))
        assert places[0][0] == RSDP_GPA
        assert places[-1][1] <= 0x10_0000
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))


def test_one_cpu_is_told_of_no_apic():
    assert set(Memory(1).tables()) == {"XSDT", "FACP"}


def test_several_cpus_are_told_of_theirs_and_of_the_ioapic():
    madt = Memory(3).tables()["APIC"]
    assert struct.unpack("<II", madt[HEADER : HEADER + 8]) == (0xFEE0_0000, 1)
    entries, at = [], HEADER + 8
    while at < len(madt):
        entries.append((madt[at], madt[at + 2 : at + madt[at + 1]]))
        at += madt[at + 1]
    assert at == len(madt)
    assert entries[:3] == [(0, bytes((number, number, 1, 0, 0, 0))) for number in range(3)]
    assert entries[3] == (1, struct.pack("<BxII", 0, 0xFEC0_0000, 0))
    assert entries[4] == (2, struct.pack("<BBIH", 0, 9, 9, 0b1101)), "the SCI is level-triggered, and high"
    assert entries[5] == (4, struct.pack("<BHB", 0xFF, 0, 1))


def test_the_fadt_says_where_power_management_is():
    memory = Memory(1)
    fadt = memory.tables()["FACP"]
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert facs % 64 == 0
    assert memory.read(facs, 8) == b"FACS" + struct.pack("<I", 64)
    assert memory.table(dsdt)[:4] == b"DSDT"
    assert struct.unpack_from("<Q", fadt, 140)[0] == dsdt
    assert (len(fadt), struct.unpack_from("<HI", fadt, 46)) == (276, (9, 0))
    assert struct.unpack_from("<8I", fadt, 56) == (0x600, 0, 0x604, 0, 0, 0x608, 0, 0)
    assert (tuple(fadt[88:95]), fadt[108]) == ((4, 2, 0, 4, 0, 0, 0), 0x32)
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 0x06)
    assert [struct.unpack_from("<BBBBQ", fadt, at) for at in (148, 172, 208)] == [
        (1, 32, 0, 3, 0x600),
        (1, 16, 0, 2, 0x604),
        (1, 32, 0, 3, 0x608),
    ]
    assert sum(fadt[160:172] + fadt[184:208] + fadt[220:]) == 0


def test_aml_in_its_shortest_form():
    assert [aml.integer(value) for value in (0, 1, 2, 0x100, 0x1_0000)] == [
        b"\x00",
        b"\x01",
        b"\x0a\x02",
        b"\x0b\x00\x01",
        b"\x0c\x00\x00\x01\x00",
    ]
    with pytest.raises(ValueError, match="more than 32 bits"):
        aml.integer(1 << 32)
    assert aml.eisa_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"
    assert aml.name("\\_S5", aml.package(aml.integer(5))) == b"\x08\\_S5_\x12\x04\x01\x0a\x05"


@pytest.mark.parametrize(
    ("body", "length"), [(58, b"\x3f"), (59, b"\x41\x04"), (4089, b"\x4f\xff"), (4090, b"\x81\x00\x01")]
)
def test_lengths_of_one_two_and_three_bytes(body, length):
    """The package's length counts itself, the name (4 bytes) and what follows it."""
    scope = aml.scope("NAME", bytes(body))
    assert scope == b"\x10" + length + b"NAME" + bytes(body)


@pytest.fixture
def iasl(tmp_path):
    """Disassemble a table, compile it again, and return the source and what was said."""
    if (tool := shutil.which("iasl")) is None:
        pytest.skip("iasl is not installed: apt install acpica-tools")

    def run(table):
        (tmp_path / "t.aml").write_bytes(table)
        said = ""
        for arguments in (("-d", "t.aml"), ("t.dsl",)):
            done = subprocess.run(
                (tool, *arguments), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
            )
            said += done.stdout + done.stderr
        return (tmp_path / "t.dsl").read_text(), said

    return run


@pytest.mark.parametrize("cpus", [1, 2])
def test_acpica_reads_every_table_without_a_complaint(iasl, cpus):
    memory = Memory(cpus)
    tables = memory.tables()
    (dsdt,) = struct.unpack_from("<I", tables["FACP"], 40)
    for name, table in (*tables.items(), ("DSDT", memory.table(dsdt))):
        source, said = iasl(table)
        assert not re.search(r"(?i)\b(invalid|unknown|bad)\b", source + said), name
        if name != "XSDT":  # which it cannot compile
            assert "0 Errors, 0 Warnings, 0 Remarks" in said, name


def test_acpica_reads_what_was_meant(iasl):
    memory = Memory(1)
    (dsdt,) = struct.unpack_from("<I", memory.tables()["FACP"], 40)
    source, _ = iasl(memory.table(dsdt))
    source = re.sub(r"\s*//.*|/\*.*?\*/", "", source)
    source = re.sub(r"\s+", " ", source)
    for part in (
        'Name (_HID, EisaId ("PNP0A03") )',
        "Package (0x04) { 0x0001FFFF, Zero, Zero, 0x0B }, Package (0x04) { 0x0002FFFF, Zero, Zero, 0x0A }",
        "0x00000000, 0xE0000000, 0xEFFFFFFF, 0x00000000, 0x10000000,",
        'Device (COM1) { Name (_HID, EisaId ("PNP0501") ) Name (_CRS, ResourceTemplate () '
        "{ IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, ) IRQ (Edge, ActiveHigh, Exclusive, ) {4} })",
        "Memory32Fixed (ReadWrite, 0xFEB00000, 0x00001000, )",
        "Name (\\_S5, Package (0x04) { 0x05, 0x05, Zero, Zero })",
    ):
        assert part in source
