"""The commands as a user of dom0 types them, and what they refuse."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import forkserver
import pytest
from xen_guests import (
    MEMORY_BYTES,
    create,
    destroy,
    domid_of,
    log_dirty_is_off,
    low_memory,
    pageferry,
    wait_for_work,
    xl,
)

from pageferry.guests.linux.debian import LinuxImage
from pageferry.xen import uapi
from pageferry.xen.holder import holder_of

LINUX = LinuxImage.of(Path(__file__).parents[2] / "build" / "linux" / "cloud")


@contextlib.contextmanager
def watching(domid):
    """A process that watches a domain, when it has seen the first round."""
    command = ["xen", "log-dirty", domid, "--interval", 0.5, "--rounds", 9999]
    with forkserver.start(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("round")
        yield process


def test_a_session_in_dom0(control, domain_name, working, tmp_path):
    domid, memory = working
    domains = json.loads(pageferry("xen", "list", "--json"))["domains"]
    assert [(each["domid"], each["kind"]) for each in domains] == [(0, "pv"), (domid, "pvh")]
    seen = domains[1]
    assert (seen["name"], seen["paging"], seen["status"], seen["log_dirty"]) == (domain_name, "hap", "running", False)
    assert domain_name in pageferry("xen", "list")

    watched = json.loads(pageferry("xen", "log-dirty", domain_name, "--rounds", 3, "--interval", 0.2, "--json"))
    assert len(watched["rounds"]) == 3
    assert all(1 < each["dirty_pages"] < MEMORY_BYTES >> 12 for each in watched["rounds"])
    assert "█" in pageferry("xen", "log-dirty", domid, "--rounds", 1, "--plot")

    file = tmp_path / "guest.xl"
    report = json.loads(pageferry("save", f"xen:{domain_name}", file, "--policy", "xen", "--json"))
    assert (report["status"], report["guest_at"], report["tracker"]) == ("completed", "source", "xen")
    wait_for_work(memory, 100)
    assert "whole" in pageferry("inspect", file, "--check")
    pageferry("save", f"xen:{domid}", file, "--policy", "xen", "--stop")
    assert control.info(domid).shutdown_reason == uapi.SHUTDOWN_suspend
    destroy(domain_name)
    xl("restore", file)
    restored = low_memory(control, domid_of(domain_name), MEMORY_BYTES - (1 << 20))
    wait_for_work(restored, 100)
    restored.close()

    moved = json.loads(
        pageferry("migrate", f"xen:{domain_name}", "--through", "xl migrate-receive", "--policy", "xen", "--json")
    )
    assert (moved["status"], moved["guest_at"]) == ("completed", "destination")
    destroy(f"{domain_name}--migratedaway")
    there = low_memory(control, domid_of(domain_name), MEMORY_BYTES - (1 << 20))
    wait_for_work(there, 100)
    there.close()


def test_a_signal_ends_watching_and_log_dirty_is_off(control, working):
    domid, _ = working
    with watching(domid) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
    assert log_dirty_is_off(control, domid)


def test_a_kill_of_watching_is_undone_by_the_next_start(control, working):
    domid, memory = working
    with watching(domid) as process:
        process.kill()
    with pytest.raises(Exception, match="EINVAL"):
        control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
    pageferry("xen", "list")
    assert log_dirty_is_off(control, domid)
    wait_for_work(memory, 100)


def test_what_cannot_be_is_refused_with_one_line(control, working, tmp_path):
    domid, memory = working
    file = tmp_path / "file"
    assert "there is no domain 'nobody'" in pageferry("save", "xen:nobody", file, code=2)
    assert "there is no domain 9999" in pageferry("xen", "log-dirty", 9999, code=2)
    assert "domain 0 is this one" in pageferry("save", "xen:0", file, code=5)
    assert "postcopy policy" in pageferry("save", f"xen:{domid}", file, "--policy", "postcopy", code=2)
    control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
    assert "log-dirty" in pageferry("save", f"xen:{domid}", file, code=3)
    assert "on already" in pageferry("xen", "log-dirty", domid, code=2)
    listed = json.loads(pageferry("xen", "list", "--json"))["domains"][1]
    assert listed["log_dirty"] is True  # it was another's, and is left alone
    control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)
    with watching(domid) as process:
        told = pageferry("save", f"xen:{domid}", file, code=2)
        assert f"process {process.pid}, a pageferry, works on domain {domid} already" in told
        process.send_signal(signal.SIGINT)
    assert not file.exists()
    wait_for_work(memory, 100)


#: A receiver that takes the beginning of a domain, and no more.
_STALLS = "echo 'xl migration receiver ready, send binary domain data.'; head -c 1000000 >/dev/null; exec sleep 9999"


def test_who_holds_log_dirty_is_named(control, domain_name, working):
    domid, memory = working
    command = ["xl", "migrate", "-s", "", domain_name, f"exec sh -c {shlex.quote(_STALLS)}"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        try:
            by = f"process {process.pid}, xl migrate"
            until = time.monotonic() + 120
            while not holder_of(domid) or log_dirty_is_off(control, domid):
                assert time.monotonic() < until
                time.sleep(0.2)
            assert f"on, by {by}" in pageferry("xen", "list")
            assert f"log-dirty of domain {domid} is on already, by {by}" in pageferry("xen", "log-dirty", domid, code=2)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)  # nothing of Xen's does it now
    wait_for_work(memory, 100)


def test_what_the_domains_write_is_shown(domain_name, working):
    domid, _ = working
    seen = json.loads(pageferry("xen", "list", "--dirty-rate", 0.5, "--json"))["domains"]
    assert [each["domid"] for each in seen] == [0, domid]
    assert seen[0]["dirty_pages"] is None
    assert 1 < seen[1]["dirty_pages"] < MEMORY_BYTES >> 12
    assert seen[1]["watched_s"] >= 0.5
    assert "iB/s" in pageferry("xen", "list", "--dirty-rate", 0.1)


def test_a_pv_domain_is_refused(own_name, tmp_path):
    if not LINUX.kernel.exists():
        pytest.skip("no Linux here: make linux-image ONLY=cloud")
    create(tmp_path, own_name, memory_mib=128, kernel=LINUX.kernel, kind="pv")
    assert "is a PV guest" in pageferry("save", f"xen:{own_name}", tmp_path / "file", code=5)
    assert "is a PV guest" in pageferry("xen", "log-dirty", own_name, code=5)


def test_a_domain_with_a_device_model_is_watched_but_not_saved(control, own_name, tmp_path):
    domid = create(tmp_path, own_name, memory_mib=64, kind="hvm", more='vnc = 0\nvga = "none"')
    listed = json.loads(pageferry("xen", "list", "--json"))["domains"][1]
    assert (listed["domid"], listed["kind"]) == (domid, "hvm")
    refused = f"domain {domid} is of type hvm: its device model's state is not read here"
    assert refused in pageferry("save", f"xen:{own_name}", tmp_path / "file", code=5)
    assert refused in pageferry("migrate", f"xen:{own_name}", "--through", "xl migrate-receive", code=5)
    assert not (tmp_path / "file").exists()
    assert "round" in pageferry("xen", "log-dirty", own_name, "--rounds", 1, "--interval", 0.1)
    assert log_dirty_is_off(control, domid)


@pytest.mark.usefixtures("control")
def test_who_may_not_is_told_so():
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-m", "pageferry", "xen", "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    assert "/dev/xen/privcmd may not be opened by this user" in done.stderr
