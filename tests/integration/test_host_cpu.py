"""A guest that sees its host's CPU and not its CPUID table: both ends and the report warn before the first page."""

from dataclasses import replace

import pytest

from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.events import RoundBegan, Warned
from pageferry.core.host_cpu import cpu_warning, described
from pageferry.core.policies import XenPolicy
from pageferry.engine.image.save import Save
from pageferry.engine.source import Source
from pageferry.hypervisor.domain import Domain

KEEPS = described(SOFT_CPU, keeps_cpuid=True)
SHOWS = replace(KEEPS, keeps_cpuid=False)
OTHER = replace(SHOWS, name="another CPU", features="0" * 16)


@pytest.fixture
def accel():
    return "soft"  # the machine tells the engine nothing of its CPU: the test does


def warned(events):
    """Return the texts of the warnings, all of which came before the first page."""
    kinds = [type(event) for event in events]
    first_page = kinds.index(RoundBegan) if RoundBegan in kinds else len(kinds)
    assert Warned not in kinds[first_page:]
    return [event.text for event in events if isinstance(event, Warned)]


@pytest.mark.parametrize(
    ("here", "there"), [(SHOWS, OTHER), (SHOWS, None), (KEEPS, OTHER), (SHOWS, SHOWS), (KEEPS, KEEPS), (None, None)]
)
def test_both_ends_and_the_report_warn_of_a_cpu_that_the_guest_will_not_see_again(guests, inns, here, there):
    inn, told_here, told_there = inns(Domain), [], []
    endpoint = inn.open(host_cpu=lambda _: there, on_event=told_there.append)
    report = Source(guests("idle"), endpoint, XenPolicy(), host_cpu=here, on_event=told_here.append).run()
    assert not isinstance(inn.outcome(), Exception)
    expected = [text for text in [cpu_warning(here, there)] if text is not None]
    assert warned(told_here) == warned(told_there) == list(report.warnings) == expected
    assert report.status == "completed"


def test_a_save_says_where_its_file_can_be_restored(guests, tmp_path):
    events = []
    report = Save(guests("idle"), tmp_path / "guest", XenPolicy(), host_cpu=SHOWS, on_event=events.append).run()
    assert warned(events) == list(report.warnings) == [f"{SHOWS.warning}; restore it on a host with the same CPU"]
