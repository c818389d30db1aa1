"""The block device against a file: every request, its bounds, and what a driver may do wrong."""

import errno
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from virtio_driver import EVENT_IDX, INDIRECT, VERSION_1, wait_until

from pageferry.core.errors import UsageError, VmError

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTORS = 2048


class Blk:
    """Requests by a driver."""

    def __init__(self, made, features=VERSION_1, **more):
        self.made = made
        made.virtio.claim()
        self.driver = made.driver()
        assert self.driver.begin(features, **more)
        self.ring, self.memory, self.area = self.driver.rings[0], made.memory, self.driver.area

    def request(self, kind, sector, data=b"", read=0, *, split=False, indirect=False):
        """Do one request; return its status, what was read, and the length in the used ring."""
        head = struct.pack("<IIQ", kind, 0, sector) + data
        source, target = self.area.take(len(head)), self.area.take(read + 1)
        self.memory.write(source, head)
        self.memory.write(target, b"\xaa" * read + b"\xff")
        readable, writable = [(source, 16), (source + 16, len(data))], [(target, read), (target + read, 1)]
        if split:  # any arrangement of descriptors (section 2.7.4)
            readable = [(source, 5), (source + 5, 18), (source + 23, len(head) - 23)]
            writable = [(target, 7), (target + 7, read - 6)]
        readable, writable = [r for r in readable if r[1] > 0], [w for w in writable if w[1] > 0]
        self.ring.add(readable, writable, indirect=indirect)
        self.ring.notify()
        ((_, length),) = self.ring.wait()
        answer = self.memory.read(target, read + 1)
        return answer[read], answer[:read], length


@pytest.fixture(params=[VERSION_1, VERSION_1 | EVENT_IDX | INDIRECT], ids=["plain", "all"])
def blk(request, machine, disk):
    return Blk(machine(disk), request.param)


def test_the_configuration_tells_the_disk(blk):
    config = [blk.driver.config(at, size) for at, size in ((0, 8), (8, 4), (12, 4), (20, 4))]
    assert config == [SECTORS, 64 << 10, 126, 512]
    assert [blk.driver.config(at, 4) for at in (36, 40, 44, 48, 52)] == [1 << 22, 16, 1, 126 * 128, 1]
    assert blk.driver.config(56, 1) == 1
    assert blk.driver.offered() & 0xFF_FFFF == 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14


@pytest.mark.parametrize("split", [False, True])
def test_sectors_are_read_and_written(blk, disk_file, split):
    indirect = bool(blk.driver.get(0xC, 4) & INDIRECT)
    assert blk.request(IN, 5, read=1024, split=split, indirect=indirect) == (
        OK,
        b"\5\0\0\0" * 128 + b"\6\0\0\0" * 128,
        1025,
    )
    data = os.urandom(1536)
    assert blk.request(OUT, 2045, data, split=False, indirect=indirect) == (OK, b"", 1)
    assert disk_file.read_bytes()[2045 * 512 :] == data
    assert blk.request(IN, 2045, read=1536)[1] == data


def test_what_is_read_is_marked_and_what_is_written_is_not(blk):
    blk.made.marked.clear()
    target, source = blk.area.take(0x3000, 0x1000), blk.area.take(0x1000, 0x1000)
    status = blk.area.take(0x1000, 0x1000)
    blk.memory.write(source, struct.pack("<IIQ", IN, 0, 8))
    blk.ring.add([(source, 16)], [(target, 0x2200), (status, 1)])
    blk.made.marked.clear()
    blk.ring.notify()
    blk.ring.wait()
    marked = set(blk.made.marked)
    assert {target >> 12, target + 0x2000 >> 12, status >> 12, blk.ring.used >> 12} <= marked
    assert source >> 12 not in marked


def test_flush_and_identity(blk):
    assert blk.request(FLUSH, 0) == (OK, b"", 1)
    assert blk.request(GET_ID, 0, read=20) == (OK, b"disk0".ljust(20, b"\0"), 21)
    assert blk.request(GET_ID, 0, read=4) == (OK, b"disk", 5)


def test_zeroes_are_written_and_ranges_discarded(blk, disk_file):
    before = disk_file.stat().st_blocks
    assert blk.request(WRITE_ZEROES, 0, struct.pack("<QII", 10, 20, 1)) == (OK, b"", 1)
    assert blk.request(WRITE_ZEROES, 0, struct.pack("<QII", 40, 1, 0)) == (OK, b"", 1)
    content = disk_file.read_bytes()
    assert content[10 * 512 : 30 * 512] == bytes(20 * 512)
    assert content[40 * 512 : 41 * 512] == bytes(512)
    assert content[30 * 512 : 31 * 512] == (30).to_bytes(4, "little") * 128
    ranges = struct.pack("<QIIQII", 64, 960, 0, 1024, 1024, 0)
    assert blk.request(DISCARD, 0, ranges) == (OK, b"", 1)
    assert disk_file.stat().st_blocks < before
    assert disk_file.stat().st_size == SECTORS * 512


@pytest.mark.parametrize("unmap", [0, 1])
def test_zeroes_are_written_where_the_file_system_has_no_other_way(blk, disk_file, monkeypatch, unmap):
    monkeypatch.setattr("pageferry.backends.disk.libc.fallocate", lambda *_: -1)
    monkeypatch.setattr("pageferry.backends.disk.ctypes.get_errno", lambda: errno.EOPNOTSUPP)
    assert blk.request(WRITE_ZEROES, 0, struct.pack("<QII", 1, 2047, unmap)) == (OK, b"", 1)
    assert disk_file.read_bytes() == bytes(512) + bytes(2047 * 512)
    assert blk.request(DISCARD, 0, struct.pack("<QII", 1, 2047, 0)) == (OK, b"", 1)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ((IN, SECTORS, b"", 512), IOERR),
        ((IN, SECTORS - 1, b"", 1024), IOERR),
        ((IN, 2**64 - 1, b"", 512), IOERR),
        ((IN, 0, b"", 100), IOERR),
        ((IN, 0, b"", 0), IOERR),
        ((OUT, SECTORS, bytes(512)), IOERR),
        ((OUT, 0, bytes(513)), IOERR),
        ((OUT, 0), IOERR),
        ((DISCARD, 0, struct.pack("<QII", 0, 1, 1)), UNSUPP),
        ((DISCARD, 0, struct.pack("<QII", 0, 0, 0)), IOERR),
        ((DISCARD, 0, struct.pack("<QII", SECTORS, 1, 0)), IOERR),
        ((DISCARD, 0, struct.pack("<QII", 2**64 - 1, 1, 0)), IOERR),
        ((DISCARD, 0, bytes(15)), IOERR),
        ((DISCARD, 0, bytes(16 * 17)), IOERR),
        ((WRITE_ZEROES, 0, struct.pack("<QII", 0, 1, 2)), UNSUPP),
        ((WRITE_ZEROES, 0, struct.pack("<QIIQII", 0, 1, 0, 1, 1, 0)), IOERR),
        ((WRITE_ZEROES, 0), IOERR),
        ((2, 0), UNSUPP),
        ((0xFFFF_FFFF, 0), UNSUPP),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(blk, disk_file, request_, status):
    before = disk_file.read_bytes()
    kind, sector, *rest = request_
    answer = blk.request(kind, sector, *rest)
    assert answer[0] == status
    assert disk_file.read_bytes() == before
    assert not blk.driver.broken
    assert blk.request(FLUSH, 0)[0] == OK


def test_a_larger_request_than_was_offered_fails(machine, disk, disk_file):
    os.truncate(disk_file, 16 << 20)
    blk = Blk(machine(replace(disk, size_bytes=0)))
    assert blk.request(IN, 0, read=126 * 65536)[0] == OK
    assert blk.request(IN, 0, read=126 * 65536 + 512)[0] == IOERR


def test_a_request_without_a_header_fails_and_one_without_a_status_ends_the_device(blk):
    status = blk.area.take(1)
    blk.ring.add([], [(status, 1)])
    blk.ring.notify()
    blk.ring.wait()
    assert blk.memory.read(status, 1) == bytes((IOERR,))
    blk.ring.add([(0x1000, 16)])
    blk.ring.notify()
    wait_until(lambda: blk.driver.broken)
    assert blk.made.lines == {11: True}
    assert blk.driver.isr() & 2
    blk.ring.add([(0x1000, 16)], [(status, 1)])
    blk.memory.write(status, b"\xff")
    blk.ring.notify()
    assert blk.memory.read(status, 1) == b"\xff"


def test_a_disk_that_is_only_read_is_not_written(machine, disk, disk_file):
    disk_file.chmod(0o444)
    blk = Blk(machine(replace(disk, readonly=True)))
    assert blk.driver.offered() & 1 << 5
    assert not blk.driver.offered() & (1 << 13 | 1 << 14)
    before = disk_file.read_bytes()
    for request in ((OUT, 0, bytes(512)), (DISCARD, 0, struct.pack("<QII", 0, 1, 0)), (WRITE_ZEROES, 0, bytes(16))):
        assert blk.request(*request)[0] == IOERR
    assert blk.request(FLUSH, 0)[0] == OK
    assert blk.request(IN, 1, read=512)[0] == OK
    assert disk_file.read_bytes() == before


def test_a_disk_that_was_given_back_is_neither_read_nor_written(blk, disk_file):
    before = disk_file.read_bytes()
    blk.made.virtio.release()
    header, data, status = blk.area.take(16), blk.area.take(512), blk.area.take(1)
    blk.memory.write(header, struct.pack("<IIQ", OUT, 0, 0))
    blk.ring.add([(header, 16), (data, 512)], [(status, 1)])
    blk.ring.notify()
    assert not blk.ring.collect()
    assert disk_file.read_bytes() == before
    blk.made.virtio.claim()  # whoever has the disk then does it
    assert blk.ring.wait()
    assert disk_file.read_bytes()[:512] == bytes(512)


def test_a_disk_that_became_shorter_fails_and_goes_on(blk, disk_file):
    os.truncate(disk_file, 512)
    assert blk.request(IN, 1, read=512)[0] == IOERR
    assert blk.request(IN, 0, read=512)[0] == OK


def test_another_disk_is_refused_by_name(blk, machine, disk, tmp_path):
    other = Path(tmp_path, "other")
    other.write_bytes(bytes(4096))
    there = machine(replace(disk, backend=str(other)))
    with pytest.raises(VmError, match="disk0"):
        there.bus.load(blk.made.bus.save())
    (spec,) = blk.made.virtio.specs
    assert spec.size_bytes == 1 << 20
    with pytest.raises(UsageError, match="disk0"):
        machine(replace(spec, backend=str(other)))


def test_the_status_is_the_last_byte_whatever_comes_after_it(blk):
    head, target = blk.area.take(16), blk.area.take(1024)
    blk.memory.write(head, struct.pack("<IIQ", 0, 0, 3))
    blk.memory.write(target, b"\xff" * 1024)
    blk.ring.add([(head, 16)], [(target, 0), (target + 1, 512), (target + 513, 1), (target + 700, 0)])
    blk.ring.notify()
    assert [length for _, length in blk.ring.wait()] == [513]
    assert blk.memory.read(target, 1024) == b"\xff" + (3).to_bytes(4, "little") * 128 + b"\0" + b"\xff" * 510
