"""The operators and the state of real Xen, as it is: what the tracker and the documents say of it is so."""

import errno
from types import SimpleNamespace

import numpy as np
import pytest
from xen_guests import create, load_program, low_memory, wait_for_work
from xen_machine import XenMachine

from pageferry.core.errors import UsageError, XenError
from pageferry.testing.lab import Lab
from pageferry.xen import uapi
from pageferry.xen.domain import XenDomain, read_configuration
from pageferry.xen.domctl import Control

OFF, ENABLE = uapi.XEN_DOMCTL_SHADOW_OP_OFF, uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY
CLEAN, PEEK = uapi.XEN_DOMCTL_SHADOW_OP_CLEAN, uapi.XEN_DOMCTL_SHADOW_OP_PEEK
MEMORY_BYTES = 4 << 20
PAGES = MEMORY_BYTES >> 12


@pytest.fixture
def stamping(control):
    """A guest that writes what it is told, at its first sync point; log-dirty off."""
    lab = Lab(make_vm=XenMachine, memory_bytes=MEMORY_BYTES, seed=1)
    with lab.stamping() as guest:
        domid = guest.vm.domid
        yield SimpleNamespace(
            domid=domid,
            raw=lambda op, **given: control.shadow_op(domid, op, **given),
            play=guest.play,
            oracle=guest.oracle,
            memory=guest.memory,
        )
        control.shadow_op(domid, OFF)


def bitmap(control, domid, op, pages=PAGES):
    words = np.zeros(-(-pages // 64), np.uint64)
    stats = control.shadow_op(domid, op, words=words, pages=pages)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()), stats


def test_this_is_the_xen_that_the_documents_speak_of(control):
    assert control.interface_version == {(4, 17): 0x15}.get(control.release, control.interface_version)
    assert control.info(0).is_hvm is False


def test_what_is_written_is_what_clean_returns(control, stamping):
    stamping.raw(ENABLE)
    for number in (1, 3, 5, 7):
        stamping.play(number)
        found, stats = bitmap(control, stamping.domid, CLEAN)
        stamped = set(stamping.oracle.written(number).tolist())
        assert stamped <= found, stamped - found
        assert stats.dirty_count >= len(found)
        assert stats.fault_count == 0  # HAP does not count them


def test_off_twice_is_no_error_and_enable_twice_is_einval(stamping):
    stamping.raw(OFF)
    stamping.raw(OFF)
    stamping.raw(ENABLE)
    with pytest.raises(XenError) as refused:
        stamping.raw(ENABLE)
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("op", [PEEK, CLEAN])
def test_off_it_answers_with_an_empty_bitmap(control, stamping, op):
    stamping.play(3)
    found, stats = bitmap(control, stamping.domid, op)
    assert (found, stats.dirty_count) == (set(), 0)


def test_after_enable_the_bitmap_is_empty(control, stamping):
    stamping.play(3)
    stamping.raw(ENABLE)
    assert bitmap(control, stamping.domid, PEEK)[0] == set()


def test_a_peek_without_a_buffer_counts_only(control, stamping):
    stamping.raw(ENABLE)
    stamping.play(3)
    counted = stamping.raw(PEEK, pages=PAGES)
    assert counted.dirty_count == bitmap(control, stamping.domid, PEEK)[1].dirty_count > 0


def test_an_unknown_operator_and_an_unknown_domain_are_refused(control, stamping):
    with pytest.raises(XenError) as refused:
        control._do(uapi.XEN_DOMCTL_shadow_op, stamping.domid, lambda u: setattr(u.shadow_op, "op", 99))
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(UsageError, match="there is no domain 32000"):
        control.info(32000)


def test_writes_through_a_foreign_mapping_are_not_logged(control, stamping):
    stamping.raw(ENABLE)
    np.frombuffer(stamping.memory.mapping.view, np.uint8)[3 << 12] = 1
    assert 3 not in bitmap(control, stamping.domid, CLEAN)[0]
    words = np.zeros(PAGES // 64, np.uint64)
    control.shadow_op(stamping.domid, PEEK, mode=uapi.XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL, words=words, pages=PAGES)
    assert not words[0] >> np.uint64(3) & np.uint64(1)


def test_a_short_clean_and_the_bits_beyond_it(control, stamping):
    """They are lost: Xen clears all of a leaf of its bitmap, 32,768 frames, of which it returned a part."""
    stamping.raw(ENABLE)
    stamping.play(3)
    whole, _ = bitmap(control, stamping.domid, PEEK)
    first, stats = bitmap(control, stamping.domid, CLEAN, pages=64)
    assert first == {gfn for gfn in whole if gfn < 64}
    assert stats.dirty_count >= len(whole)  # of the whole domain
    rest, stats = bitmap(control, stamping.domid, CLEAN)
    assert (rest, stats.dirty_count) == (set(), 0)
    assert whole - first


def test_a_wrong_interface_version_is_eacces(control):
    mine = Control()
    with mine:
        mine.interface_version = 0x12
        with pytest.raises(XenError) as refused:
            mine.info(0)
    assert refused.value.errno == errno.EACCES


def test_a_domain_is_as_xl_made_it(control, store, own_name, tmp_path):
    domid = create(tmp_path, own_name, memory_mib=12)
    info = control.info(domid)
    assert (info.is_hvm, info.hap, info.paused, info.vcpus, info.shutdown_reason) == (True, True, True, 1, None)
    assert b'"type": "pvh"' in read_configuration(info)
    domain = XenDomain(control, store, info)
    try:
        assert domain.memory.pages - domain.memory.removed().size == info.memory_pages
        assert domain.memory.regions[0].size_bytes == 12 << 20
        assert domain.cpuid
        assert domain.last_records()
        with pytest.raises(UsageError, match="works on domain"):
            XenDomain(control, store, info)
    finally:
        domain.close()


def test_a_domain_suspends_and_goes_on(control, store, own_name, tmp_path):
    domid = create(tmp_path, own_name, memory_mib=12)
    memory, _ = load_program(control, domid, "kv", 8 << 20)
    control.unpause(domid)
    wait_for_work(memory, 100)
    domain = XenDomain(control, store, control.info(domid))
    domain.suspends = True
    domain.freeze()
    assert control.info(domid).shutdown_reason == uapi.SHUTDOWN_suspend
    before = low_memory(control, domid, 8 << 20, writable=False).read(0, 8 << 20)
    assert domain.end is None
    assert memory.read(0, 8 << 20) == before
    domain.suspends = False
    domain.thaw()
    assert control.info(domid).shutdown_reason is None
    wait_for_work(memory, 100)
    domain.close()
    memory.close()
