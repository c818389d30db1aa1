"""What this process's page tables tell of private memory."""

import numpy as np
import pytest

from pageferry.core import pagemap
from pageferry.core.errors import UffdError, UnsupportedError
from pageferry.core.frames import PAGE_SIZE, SIZE_2M
from pageferry.core.hostmem import MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, HostMapping
from pageferry.core.hugepages import HugePages, chosen

PAGES = 1024
SIZE = PAGES * PAGE_SIZE


@pytest.fixture
def mapping():
    made = HostMapping(SIZE)
    made.map_private(0, SIZE)
    made.advise(0, SIZE, MADV_NOHUGEPAGE)
    return made


def runs(mapping, find=pagemap.filled_runs):
    starts, lengths = find(mapping.hva, mapping.size_bytes)
    assert (starts.dtype, lengths.dtype) == (np.uint64, np.uint64)
    return list(zip(starts.tolist(), lengths.tolist(), strict=True))


def touch(mapping, *pages):
    for page in pages:
        mapping.view[page * PAGE_SIZE] = 1


@pytest.mark.parametrize("find", [pagemap.filled_runs, pagemap._read_runs], ids=["scan", "pagemap"])
def test_what_was_written_is_found_in_runs(mapping, find):
    assert runs(mapping, find) == []
    touch(mapping, 0, 5, 6, 7, PAGES - 1)
    assert runs(mapping, find) == [(0, 1), (5, 3), (PAGES - 1, 1)]
    mapping.advise(6 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    assert runs(mapping, find) == [(0, 1), (5, 1), (7, 1), (PAGES - 1, 1)]
    touch(mapping, *range(PAGES))
    assert runs(mapping, find) == [(0, PAGES)]


def test_what_was_only_read_is_not(mapping):
    try:
        pagemap.PagemapFd().close()
    except UnsupportedError as error:
        pytest.skip(f"{error}: the older interface cannot tell")
    assert mapping.view[3 * PAGE_SIZE] == 0
    touch(mapping, 9)
    assert runs(mapping) == [(9, 1)]


def test_runs_that_end_where_an_answer_is_full_are_joined(mapping, monkeypatch):
    monkeypatch.setattr(pagemap, "_REGIONS", 2)
    touch(mapping, 0, 2, 3, 5, 7, 8, 9, 11)
    assert runs(mapping) == [(0, 1), (2, 2), (5, 1), (7, 3), (11, 1)]


def test_a_huge_page_is_one_run(mapping):
    mapping.advise(0, SIZE, MADV_HUGEPAGE)
    touch(mapping, 600)
    if mapping.huge_bytes() != SIZE_2M:
        pytest.skip("the kernel gave no huge page")
    assert runs(mapping) == [(512, 512)]


@pytest.mark.parametrize("at_once", [1, 7, PAGES])
def test_the_pagemap_is_read_in_parts(mapping, monkeypatch, at_once):
    monkeypatch.setattr(pagemap, "_ENTRIES", at_once)
    touch(mapping, 6, 7, 8, 20)
    assert runs(mapping, pagemap._read_runs) == [(6, 3), (20, 1)]


def test_a_kernel_without_the_scan_is_asked_the_older_way(mapping, monkeypatch):
    monkeypatch.setattr(pagemap, "PAGEMAP_SCAN", 0xC0606611)
    touch(mapping, 4)
    assert runs(mapping) == [(4, 1)]


def test_no_pagemap_is_said(mapping, monkeypatch, tmp_path):
    monkeypatch.setattr(pagemap, "PAGEMAP", tmp_path / "none")
    assert not pagemap.can_tell()
    settings = {"enabled": "[always] madvise never\n", "shmem_enabled": "[never]\n"}
    assert chosen(HugePages.AUTO, needs_file=False, **settings) is HugePages.OFF
    with pytest.raises(UnsupportedError, match="cannot be opened: No such file"):
        runs(mapping)
    monkeypatch.setattr(pagemap, "PAGEMAP", tmp_path / "empty")
    (tmp_path / "empty").touch()
    with pytest.raises(UffdError, match="read of the pagemap"):
        pagemap._read_runs(mapping.hva, mapping.size_bytes)
