"""The table window's short way does what the long one does, and what it must not do it leaves to the long one."""

import ctypes

import pytest

from pageferry.core.vm import VmConfig
from pageferry.hypervisor import table_window
from pageferry.hypervisor import unicorn_api as api
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.table_window import NO_TABLE_ANY_MORE, TableWindow

GFN, SHADOW_MFN = 7, 5
MiB = 1 << 20
GPA = GFN << 12


class Calls:
    """A window of a domain with so many vCPUs; ``long`` are the accesses that Python had to do."""

    def __init__(self, vcpus=1):
        self.domain = Domain(VmConfig(memory_bytes=16 * MiB))
        self.window = TableWindow(self.domain.machine, self.domain.memory.gfn_limit, vcpus=vcpus)
        self.mfn = self.domain.p2m.lookup(GFN)[0]
        self.shadow = self.domain.machine.frame(SHADOW_MFN).cast("Q")
        self.long = []
        self._kept = (api.MMIO_READ(self._read), api.MMIO_WRITE(self._write))
        reader, writer, self._data = self.window.attach(*self._kept)
        self._reader = ctypes.cast(reader, api.MMIO_READ)
        self._writer = ctypes.cast(writer, api.MMIO_WRITE)

    def _read(self, _engine, gpa, size, _data):
        self.long.append(("read", gpa, size))
        return 0

    def _write(self, _engine, gpa, size, value, _data):
        self.long.append(("write", gpa, size, value))

    def read(self, gpa, size):
        return self._reader(None, gpa, size, self._data)

    def write(self, gpa, size, value):
        self._writer(None, gpa, size, value, self._data)

    def open(self):
        self.window.open(GFN, self.mfn)
        self.window.shadowed(GFN, [SHADOW_MFN])


@pytest.fixture
def calls():
    made = []

    def make(**options):
        made.append(Calls(**options))
        return made[-1]

    yield make
    for one in made:
        one.domain.close()


needs_machine_code = pytest.mark.skipif(
    table_window.platform.machine() not in table_window.NATIVE_HOSTS, reason="machine code for x86-64"
)


@needs_machine_code
@pytest.mark.parametrize(("size", "at"), [(8, 0x10), (4, 0x14), (2, 0xFFE), (1, 0x3)])
def test_each_size_is_stored_and_loaded_where_it_belongs(calls, size, at):
    window = calls()
    window.open()
    around = bytes(range(1, 25))
    window.domain.memory.write(GPA + (at & -8), around[: min(24, 0x1000 - (at & -8))])
    before = window.domain.memory.read(GPA, 0x1000)
    value = 0xA1B2_C3D4_E5F6_0718 & (1 << 8 * size) - 1
    window.write(GPA + at, size, value)
    expected = before[:at] + value.to_bytes(size, "little") + before[at + size :]
    assert bytes(window.domain.memory.read(GPA, 0x1000)) == expected
    assert window.read(GPA + at, size) == value
    assert (window.long, window.window.stores) == ([], 1)


@needs_machine_code
def test_what_a_shadow_entry_was_made_of_is_written_the_long_way(calls):
    window = calls()
    window.open()
    window.shadow[3] = 1
    window.write(GPA + 0x1C, 4, 9)
    assert window.long == [("write", GPA + 0x1C, 4, 9)]
    assert window.domain.memory.read_u64(GPA + 0x18) == 0
    window.write(GPA + 0x20, 4, 9)
    assert len(window.long) == 1


@needs_machine_code
def test_so_is_what_touches_two_words_is_beyond_memory_or_has_not_one_shadow(calls):
    window = calls()
    window.open()
    limit = window.domain.memory.gfn_limit << 12
    window.write(GPA + 6, 4, 1)
    window.write(limit, 4, 1)
    window.read(limit, 4)
    window.window.shadowed(GFN, [SHADOW_MFN, SHADOW_MFN + 1])
    window.write(GPA, 4, 1)
    window.window.shadowed(GFN, [])
    window.write(GPA, 4, 1)
    assert [call[:2] for call in window.long] == [
        *(("write", GPA + 6), ("write", limit), ("read", limit)),
        *(("write", GPA), ("write", GPA)),
    ]
    assert window.window.stores == 0


@needs_machine_code
def test_a_page_that_was_not_opened_is_read_and_written_the_long_way(calls):
    window = calls()
    window.window.shadowed(GFN, [SHADOW_MFN])
    window.write(GPA, 4, 1)
    window.read(GPA, 4)
    assert [call[0] for call in window.long] == ["write", "read"]


@needs_machine_code
def test_the_write_that_makes_too_many_goes_the_long_way(calls):
    window = calls()
    window.open()
    for _ in range(NO_TABLE_ANY_MORE - 1):
        window.write(GPA, 4, 1)
    assert not window.long
    window.write(GPA, 4, 1)
    assert len(window.long) == 1
    assert window.window.written(GFN)
    window.write(GPA, 4, 1)
    assert len(window.long) == 1
    window.window.used(GFN)
    assert not window.window.written(GFN)


def test_several_vcpus_have_the_long_way_only(calls):
    window = calls(vcpus=2)
    window.open()
    window.write(GPA, 4, 1)
    window.read(GPA, 4)
    assert [call[0] for call in window.long] == ["write", "read"]
