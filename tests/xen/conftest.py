"""Tests on real Xen, in its dom0: ``make test-xen`` runs them in an emulated machine."""

import os

import pytest
from xen_guests import destroy

from pageferry.core.errors import UnsupportedError
from pageferry.xen.domctl import Control
from pageferry.xen.store import XenStore


@pytest.fixture(scope="session")
def control():
    """Xen; without one the test is skipped, or fails where PAGEFERRY_REQUIRE_XEN is set."""
    try:
        made = Control()
    except UnsupportedError as error:
        if os.environ.get("PAGEFERRY_REQUIRE_XEN"):
            raise
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture(scope="session")
def store(control):
    """Its store."""
    with XenStore() as made:
        yield made


@pytest.fixture
def domain_name(control):
    """A name for a domain, which is destroyed afterwards."""
    yield "pageferry-test"
    destroy("pageferry-test")
