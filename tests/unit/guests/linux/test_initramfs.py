import pytest

from pageferry.guests.linux.initramfs import DIRECTORY, FILE, cpio


def unpack(archive):
    """Read a "newc" archive back: path -> (mode, content)."""
    found, at = {}, 0
    while True:
        head = archive[at : at + 110]
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += (110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return found
        found[name[:-1].decode()] = (mode, archive[at : at + size])
        at += (size + 3) // 4 * 4


@pytest.mark.parametrize("size", range(5))
def test_an_archive_reads_back_whatever_the_padding(size):
    files = [("d", DIRECTORY, b""), *((f"d/{'n' * length}", FILE, b"x" * size) for length in range(1, 6))]
    assert unpack(cpio(files)) == {path: (mode, content) for path, mode, content in files}


def test_archives_follow_one_another_at_a_boundary_that_a_kernel_finds():
    assert len(cpio([("a", FILE, b"x")])) % 4 == 0


def test_an_empty_archive_is_a_trailer():
    assert unpack(cpio([])) == {}
