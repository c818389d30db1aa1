"""PostcopyClient on both machines, and a source that the test plays: only its own pages are taken."""

import errno
import threading

import numpy as np
import pytest
from altered import alter
from at_work import until

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import RecordError, RemoteStreamError, UffdError, UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE, gpa_of
from pageferry.core.hugepages import HugePages
from pageferry.core.vm import VmConfig
from pageferry.engine.handoff.take import see_off
from pageferry.engine.postcopy.client import PostcopyClient
from pageferry.engine.postcopy.pager import can_wait
from pageferry.engine.postcopy.server import MissingPages
from pageferry.kvm.vm import KvmVm
from pageferry.stream.ferry_bodies import digest_of
from pageferry.stream.ferry_frames import Complete, Dropped, Pages, Running, Wanted
from pageferry.uffd import uapi
from pageferry.uffd.fds import UffdFd

#: How long to wait for what is sure to come, however busy the host is.
GIVE_UP_S = 150
MISSING = np.array([3, 4, 5, 100, 101, 1000], np.uint64)


def content(gfns):
    """What the source has: each page full of its own number."""
    return gfns.astype(np.uint64).repeat(PAGE_SIZE // 8).view(np.uint8)


def pages(gfns, zero=(), digest=None):
    """PAGES and the content that follows it; ``zero``: gfns of it that are said to be so."""
    is_zero = np.isin(gfns, np.array(zero, np.uint64))
    data = content(gfns[~is_zero])
    return Pages(gfns=gfns, zero=is_zero, digest=digest or digest_of(gfns, is_zero, [data.data])), data


def answer(gfns):
    return pages(gfns)


class Source:
    """The peer of a destination: answers what is asked, unless it is told to say something else."""

    def __init__(self, *says):
        self.heard = []
        self.waiting = []
        self.says = list(says)
        self.asked = threading.Semaphore(0)
        self.closed = False

    def send(self, frame):
        self.heard.append(frame)
        self.waiting.append(frame)
        self.asked.release()

    def receive(self, within_s=None):
        assert self.asked.acquire(timeout=GIVE_UP_S)
        said = self.says.pop(0) if self.says else answer
        if isinstance(said, Exception):
            raise said
        wanted = self.waiting.pop(0)
        if not callable(said):
            return said
        frame, self.content = said(wanted.gfns)
        return frame

    def out_of_turn(self, frame):
        return RemoteStreamError(type(frame).__name__)

    def close(self):
        self.closed = True

    def receive_content(self, view):
        view[:] = self.content.data


@pytest.fixture
def vm(make_vm):
    made = make_vm(VmConfig(memory_bytes=8 << 20))
    for gfn in (3, 4, 7, 100):  # what pre-copy brought: old where it is missing
        made.memory.write(gpa_of(gfn), b"old" + bytes([gfn]) * (PAGE_SIZE - 3))
    yield made
    made.close()


def client_of(vm):
    missing = DirtyBitmap.of(vm.memory.gfn_limit, MISSING)
    options = {"accept": lambda _: None, "token": "", "aborted": threading.Event(), "on_event": lambda _: None}
    return PostcopyClient(vm, missing, **options)


@pytest.fixture
def client(vm):
    made = client_of(vm)
    yield made
    made.close()


def expect_all(vm):
    for gfn in MISSING.tolist():
        assert vm.memory.read(gpa_of(gfn), PAGE_SIZE) == content(np.array([gfn])).tobytes()
    assert vm.memory.read(gpa_of(7), 4) == b"old\7"
    assert vm.memory.read(gpa_of(8), PAGE_SIZE) == bytes(PAGE_SIZE)


def test_all_pages_come_once_and_then_nothing_waits(vm, client):
    source = Source()
    client.take_from(source)
    assert client.missing_pages == 0
    assert vm.memory._fetch is None
    expect_all(vm)
    asked = np.concatenate([frame.gfns for frame in source.heard])
    assert sorted(asked.tolist()) == MISSING.tolist()
    assert see_off(Source(Dropped()), client.say_complete, lambda: None)


def test_a_page_that_is_zero_comes_by_name(vm, client):
    client.take_from(Source(lambda gfns: pages(gfns, zero=[4, 1000])))
    assert [vm.memory.read(gpa_of(gfn), PAGE_SIZE) for gfn in (4, 1000)] == [bytes(PAGE_SIZE)] * 2
    assert [vm.memory.read_u64(gpa_of(gfn)) for gfn in (3, 5, 100, 101)] == [3, 5, 100, 101]


@pytest.mark.parametrize("says", [Running(), ConnectionResetError()])
def test_a_source_that_does_not_say_that_it_has_heard_is_told_again(vm, client, says):
    client.take_from(Source())
    first, again = Source(says), Source(Dropped())
    assert see_off(first, client.say_complete, lambda: again)
    assert isinstance(again.heard[-1], Complete)
    assert first.closed
    assert again.closed


def test_memory_that_was_never_touched_waits_for_no_source(vm, client):
    assert vm.memory.read(gpa_of(500), PAGE_SIZE) == bytes(PAGE_SIZE)
    vm.memory.write(gpa_of(501), b"new")
    assert vm.memory.read(gpa_of(7), 4) == b"old\7"
    client.take_from(Source())
    assert vm.memory.read(gpa_of(501), 4) == b"new\0"
    expect_all(vm)


def expect_waiting(client):
    until(lambda: client._pager._needs, "a thread that waits")


def wrong_digest(gfns):
    return pages(gfns, digest=bytes(16))


def other_content(gfns):
    frame, data = pages(gfns)
    return frame, np.concatenate([data[PAGE_SIZE:], data[:PAGE_SIZE]])


def zero_instead(gfns):
    return pages(gfns, zero=gfns.tolist(), digest=pages(gfns)[0].digest)


def other_pages(gfns):
    return answer(np.array([7], np.uint64))


def pages_that_no_guest_has(gfns):
    return answer(np.array([1 << 40], np.uint64))


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (wrong_digest, RecordError),
        (other_content, RecordError),
        (zero_instead, RecordError),
        (other_pages, RecordError),
        (pages_that_no_guest_has, RecordError),
        (Running(), RemoteStreamError),
        (ConnectionResetError(), ConnectionResetError),
    ],
)
def test_what_is_not_a_page_of_the_source_is_not_taken_and_the_next_connection_goes_on(vm, client, says, error):
    with pytest.raises(error):
        client.take_from(Source(says))
    assert client.missing_pages == MISSING.size
    client.take_from(Source())
    expect_all(vm)


def test_pages_that_threads_wait_for_at_a_cut_are_asked_for_first_on_the_next_connection(vm, client):
    came = []
    reader = threading.Thread(target=lambda: came.append(vm.memory.read_u64(gpa_of(1000))))
    reader.start()
    expect_waiting(client)
    with pytest.raises(ConnectionResetError):
        client.take_from(Source(ConnectionResetError()))
    source = Source(ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        client.take_from(source)
    first = next(frame for frame in source.heard if isinstance(frame, Wanted))
    assert (first.gfns.tolist(), first.urgent) == ([1000], True)
    assert not came
    client.take_from(Source())
    reader.join(GIVE_UP_S)
    assert came == [1000]
    told = Source(Dropped())
    assert see_off(told, client.say_complete, lambda: None)
    assert told.heard[-1].waits == 1
    said = told.heard[-1]
    assert 0 < said.median_ns == said.p99_ns == said.longest_ns == said.waited_ns


def test_a_guest_that_is_given_up_releases_waiting_threads(vm, client):
    failed = []

    def read():
        try:
            vm.memory.read(gpa_of(1000), 1)
        except VmError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    expect_waiting(client)
    client.close()
    reader.join(GIVE_UP_S)
    assert len(failed) == 1


def test_a_page_that_is_installed_is_marked(vm, client):
    """Law 4: a tracker of this guest hears of it."""
    marked = []
    vm.memory.on_write(marked.append)
    client.take_from(Source())
    vm.memory.on_write(None)
    assert sorted(np.concatenate(marked).tolist()) == MISSING.tolist()


@pytest.mark.parametrize("accel", ["kvm"], indirect=True)
def test_pages_that_came_before_the_host_refused_stay_when_they_come_again(vm, client, accel, monkeypatch):
    """Of a run of three the first was installed, and written by the guest before the others could be."""
    ioctl = UffdFd.ioctl

    def one_page_only(uffd, request, argument):
        if request == uapi.UFFDIO_COPY and argument.len > PAGE_SIZE:
            argument.len = PAGE_SIZE
            ioctl(uffd, request, argument)
            vm.memory.mapping.view[gpa_of(3) : gpa_of(3) + 8] = b"written!"
            raise UffdError("UFFDIO_COPY", errno.ENOMEM)
        return ioctl(uffd, request, argument)

    monkeypatch.setattr(UffdFd, "ioctl", one_page_only)
    with pytest.raises(UffdError):
        client.take_from(Source())
    monkeypatch.setattr(UffdFd, "ioctl", ioctl)
    client.take_from(Source())
    assert vm.memory.read(gpa_of(3), 8) == b"written!"
    assert vm.memory.read_u64(gpa_of(3) + 8) == 3
    assert [vm.memory.read_u64(gpa_of(gfn)) for gfn in (4, 5)] == [4, 5]


@pytest.mark.parametrize("gfns", [[2], [3, 7], [1 << 40]])
def test_a_source_gives_no_page_that_it_has_not_kept(vm, gfns):
    left = MissingPages(vm.memory, MISSING)
    peer = Source()
    peer.receive = lambda: Wanted(gfns=np.array(gfns, np.uint64))
    with pytest.raises(RemoteStreamError, match="asks for no missing page"):
        left.serve(peer, lambda: None)
    assert not peer.heard
    assert left.left_pages == MISSING.size


def test_a_source_sends_content_of_pages_that_have_some_and_names_the_others(vm):
    for gfn in (3, 4, 100):
        vm.memory.write(gpa_of(gfn), bytes(PAGE_SIZE))
    vm.memory.write(gpa_of(5), b"five")
    left = MissingPages(vm.memory, MISSING)
    again = Wanted(gfns=MISSING)  # its answer was lost in a cut, and counts once
    said = [Wanted(gfns=MISSING, urgent=True), again, Complete(waits=1, waited_ns=2, longest_ns=2)]
    sent, counted = [], []

    class Destination:
        def receive(self, within_s=None):
            return said.pop(0)

        def send(self, frame, content=()):
            sent.append((frame, b"".join(content)))

    left.serve(Destination(), lambda: counted.append(left.left_pages))
    (frame, data), (_, same) = sent
    assert same == data
    assert frame.gfns[~frame.zero].tolist() == [5]
    assert data == b"five" + bytes(PAGE_SIZE - 4)
    assert frame.digest == digest_of(MISSING, frame.zero, [memoryview(data)])
    assert (left.left_pages, left.urgent_pages, left.zero_pages, left.waits.waits) == (0, MISSING.size, 5, 1)
    assert counted == [0, 0]


@pytest.mark.parametrize("accel", ["kvm"], indirect=True)
def test_a_host_without_userfaultfd_is_found_out_by_trying(vm, accel, monkeypatch):
    assert can_wait(vm)

    def refuse(self, features=0):
        raise UnsupportedError("userfaultfd", "no", hint="")

    monkeypatch.setattr(UffdFd, "__init__", refuse)
    assert not can_wait(vm)


@pytest.mark.parametrize("accel", ["kvm"], indirect=True)
def test_a_failed_discard_leaves_no_page_that_looks_there(vm, accel):
    """A huge page that is not taken apart would be zeros in place of absent: that is refused."""
    alter(vm.memory.mapping, "advise", lambda _: lambda at, size_bytes, advice: None)
    with pytest.raises(UnsupportedError, match="cannot be taken apart"):
        client_of(vm)


@pytest.mark.parametrize("accel", ["kvm"], indirect=True)
def test_pages_of_huge_pages_come_one_by_one(accel, kvm_support, thp):
    vm = KvmVm(VmConfig(memory_bytes=8 << 20), huge_pages=HugePages.THP)
    try:
        vm.memory.write(0, b"old!" * (vm.memory.size_bytes // 4))
        assert vm.memory.huge_bytes() > 0
        client = client_of(vm)
        client.take_from(Source())
        for gfn in MISSING.tolist():
            assert vm.memory.read_u64(gpa_of(gfn)) == gfn
        assert vm.memory.read(gpa_of(7), 4) == b"old!"
    finally:
        vm.close()


@pytest.mark.parametrize("accel", ["kvm"], indirect=True)
def test_a_pool_of_huge_pages_is_refused(accel, kvm_support, hugetlb_pool):
    vm = KvmVm(VmConfig(memory_bytes=8 << 20), huge_pages=HugePages.HUGETLB)
    assert not can_wait(vm)
    vm.close()


@pytest.mark.parametrize("accel", ["kvm"], indirect=True)
def test_pages_come_across_what_advice_has_divided(accel, kvm_support):
    """Private memory that was touched in pieces, some huge and some not, stays several mappings for ever."""
    vm = KvmVm(VmConfig(memory_bytes=8 << 20), huge_pages=HugePages.ANONYMOUS)
    try:
        memory, across = vm.memory, np.arange(500, 1030, dtype=np.uint64)
        memory.advice.begin_arrival()
        memory.advice.make_huge(np.array([512], np.uint64), np.array([512], np.uint64))
        for gfn in (5, 700, 1100):
            memory.write(gpa_of(gfn), b"x")
        memory.advice.end_arrival()
        absent = vm.await_memory(lambda _: None, DirtyBitmap.of(memory.gfn_limit, across))
        content = np.repeat(across, PAGE_SIZE // 8)
        absent.install(across, content.view(np.uint8))
        absent.finish()
        absent.close()
        assert [memory.read_u64(gpa_of(gfn)) for gfn in across.tolist()] == across.tolist()
    finally:
        vm.close()
