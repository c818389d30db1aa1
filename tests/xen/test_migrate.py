"""A domain moves live through ``xl migrate-receive`` on this very host."""

import pytest
from xen_guests import create, destroy, domid_of, load_program, low_memory, wait_for_work

from pageferry.core.errors import GuestAt
from pageferry.core.policy_names import make_policy
from pageferry.guests.boot import GuestParams
from pageferry.xen import uapi
from pageferry.xen.domain import XenDomain, read_configuration
from pageferry.xen.migrate import XenMigration

MEMORY_BYTES = 12 << 20
RECEIVE = ["xl", "migrate-receive"]


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
    destroy(f"{domain_name}--migratedaway")


def moving(control, store, domid, command, on_event=lambda event: None):
    info = control.info(domid)
    domain = XenDomain(control, store, info)
    configuration = read_configuration(info)
    return domain, XenMigration(domain, configuration, command, make_policy("xen"), on_event=on_event)


def test_it_moves_and_goes_on_with_the_same_memory(control, store, domain_name, working):
    domid, _ = working
    domain, attempt = moving(control, store, domid, RECEIVE)
    try:
        report = attempt.run()
    finally:
        domain.close()
    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    print(f"downtime {report.downtime_s:.3f} s {report.downtime_parts_s}, total {report.total_s:.1f} s")
    assert store.read(f"/local/domain/{domid}/name") == f"{domain_name}--migratedaway"
    assert control.info(domid).shutdown_reason == uapi.SHUTDOWN_suspend
    there = domid_of(domain_name)
    assert there != domid
    moved = low_memory(control, there, MEMORY_BYTES - (1 << 20))
    wait_for_work(moved, 100)
    assert not control.info(there).paused
    moved.close()
