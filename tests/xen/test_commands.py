"""The commands as a user of dom0 types them."""

import json
import subprocess
import sys

import pytest
from xen_guests import create, destroy, domid_of, load_program, low_memory, wait_for_work, xl

from pageferry.guests.boot import GuestParams
from pageferry.xen import uapi

MEMORY_BYTES = 12 << 20


def pageferry(*arguments, code=0):
    """Run a command; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pageferry", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout if not code else done.stderr


@pytest.fixture
def working(control, domain_name, tmp_path):
    """A domain with a guest at work that checks itself: its number, and its memory."""
    domid = create(tmp_path, domain_name, memory_mib=MEMORY_BYTES >> 20)
    params = GuestParams(working_set_bytes=4 << 20)
    memory, _ = load_program(control, domid, "kv", MEMORY_BYTES - (1 << 20), params=params)
    control.unpause(domid)
    wait_for_work(memory, 100)
    yield domid, memory
    memory.close()


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
