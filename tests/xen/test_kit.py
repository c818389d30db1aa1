"""The conformance kit over tracker ``xen``: what real Xen promises, and what the tracker makes of it."""

import pytest
from xen_machine import XenMachine

from pageferry.testing import CHECKS, check_log_dirty

MEMORY_BYTES = (4 << 20) + 3 * 4096


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
def test_the_tracker_keeps_its_promise(control, check):
    check_log_dirty(XenMachine, memory_bytes=[MEMORY_BYTES], checks=[check], patience_s=600)
