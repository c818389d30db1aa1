"""Who else moves a domain is found among the processes."""

import pytest

from pageferry.xen.holder import holder_of


@pytest.fixture
def proc(tmp_path):
    def process(pid, parent, *words):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text("".join(f"{word}\0" for word in words))
        (tmp_path / str(pid) / "status").write_text(f"Name:\tx\nPPid:\t{parent}\n")

    process(1, 0, "init")
    process(7, 1, "/usr/lib/xen-4.17/bin/xl", "migrate", "guest", "host")  # which Debian's /usr/sbin/xl runs
    process(8, 7, "/usr/lib/xen-4.17/bin/libxl-save-helper", "--save-domain", "9", "-1", "5", "1", "0", "0")
    process(9, 1, "/usr/lib/xen-4.17/bin/libxl-save-helper", "--restore-domain", "9", "-1", "6", "1")
    (tmp_path / "net").mkdir()
    (tmp_path / "10").mkdir()  # it has just ended
    return tmp_path


def test_the_process_that_had_the_helper_work_is_named(proc):
    assert holder_of(5, proc) == "process 7, xl migrate"


def test_the_helper_is_named_where_the_other_is_gone(proc):
    (proc / "7" / "cmdline").unlink()
    assert holder_of(5, proc).startswith("process 8, libxl-save-helper")


@pytest.mark.parametrize("domid", [6, 9, 50])
def test_of_other_domains_nothing_is_said(proc, domid):
    assert holder_of(domid, proc) == ""
