"""The rate of the host's time stamp counter, and which rates a guest takes for its own."""

import platform
import time
from dataclasses import replace

import pytest

from pageferry.core import host_tsc
from pageferry.core.errors import UnsupportedError
from pageferry.core.host_tsc import expect_rate, host_tsc_khz
from pageferry.core.state import ring_3_state
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.hypervisor.domain import Domain

MiB = 1 << 20


@pytest.fixture
def fresh():
    """Has the rate measured anew, now and by the next test."""
    host_tsc_khz.cache_clear()
    yield
    host_tsc_khz.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="no such counter on this host")
def test_the_same_rate_is_measured_again(fresh):
    first = host_tsc_khz()
    host_tsc_khz.cache_clear()
    expect_rate(first, host_tsc_khz())


def test_a_reading_that_was_interrupted_does_not_count(fresh, monkeypatch):
    clock = time.clock_gettime_ns
    calls = iter(range(10_000))

    def slow_at_times(which):
        now_ns = clock(which)
        if next(calls) % 4 == 1:  # the second look at the clock, in every other reading
            time.sleep(0.001)
            return clock(which)
        return now_ns

    undisturbed = host_tsc_khz()
    host_tsc_khz.cache_clear()
    monkeypatch.setattr(host_tsc.time, "clock_gettime_ns", slow_at_times)
    expect_rate(undisturbed, host_tsc_khz())


def test_a_host_that_runs_no_code_of_ours_has_no_known_rate(fresh, monkeypatch):
    monkeypatch.setattr(host_tsc, "executable", lambda code: None)
    assert host_tsc_khz() is None


@pytest.mark.parametrize("own_khz", [1_000_000, 1_000_249, 999_751])
def test_a_rate_that_a_guests_ntp_can_correct_will_do(own_khz):
    expect_rate(1_000_000, own_khz)


@pytest.mark.parametrize("own_khz", [1_000_300, 999_700, 3_000_000, None])
def test_another_rate_is_refused_with_both(own_khz):
    says = f"counts at 1000000 kHz, this machine's at {own_khz or 'an unknown number of'} kHz"
    with pytest.raises(UnsupportedError, match=says) as caught:
        expect_rate(1_000_000, own_khz)
    assert caught.value.capability == "tsc-rate"


def test_the_software_machine_keeps_a_pcs_rate_and_refuses_one_that_is_not_its_own(monkeypatch):
    monkeypatch.setattr("pageferry.hypervisor.domain.host_tsc_khz", lambda: 1_000_000)
    domain = Domain(VmConfig(memory_bytes=4 * MiB, machine=MachineModel.PC))
    try:
        state = replace(domain.save_state(), vcpus=(ring_3_state(rip=0, rsp=0, cr3=0),))
        assert state.tsc_khz == 1_000_000
        domain.load_state(replace(state, tsc_khz=1_000_100))
        assert domain.save_state().tsc_khz == 1_000_100
        with pytest.raises(UnsupportedError, match="at 2000000 kHz"):
            domain.load_state(replace(state, tsc_khz=2_000_000))
    finally:
        domain.close()
