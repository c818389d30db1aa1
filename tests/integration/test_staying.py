"""What fails before the commit leaves the guest at the source, as it was, and says why."""

import contextlib
import socket
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
from altered import AlteredDestination
from at_work import runs_on
from proxy import marker
from tiers import sample
from trips import FOREVER, Rounds, expect_as_before, source_of

from mutation.tracker_marks import MarksNothing
from mutation.tracker_wrapper import Faithful
from pageferry import __version__
from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.errors import (
    GuestAt,
    LostPageError,
    MigrationError,
    PeerError,
    PolicyAbort,
    TransportError,
    UsageError,
    VmError,
)
from pageferry.core.events import RoundBegan
from pageferry.core.frames import gpa_of
from pageferry.core.policies import DowntimePolicy, XenPolicy
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.engine.destination import Destination
from pageferry.engine.wire.peer import Peer, PeerFailedError
from pageferry.guests.boot import boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.stream.encoder import Encoder
from pageferry.stream.ferry import NONCE_BYTES, PROTOCOL_VERSION
from pageferry.stream.ferry_frames import FrameType, SourceHello
from pageferry.stream.ferry_order import Side
from pageferry.stream.records import CpuidPolicy, StaticDataEnd
from pageferry.testing.operators import STRAY_GFN
from pageferry.witness.cross_check import CrossCheck

PREAMBLE = b"\x89PGFERRY" + struct.pack("<II", PROTOCOL_VERSION, 0) + bytes(NONCE_BYTES)


def test_a_page_that_the_tracker_lost_ends_the_migration_and_the_guest_stays(running, inn):
    vm = running("kv")
    vm.replace_tracker(CrossCheck(MarksNothing(vm), None, vm.memory, still=lambda: vm.run_control.still))

    def write_unmarked(event):
        if isinstance(event, RoundBegan) and event.index == 0:
            vm.memory.write(gpa_of(STRAY_GFN), b"lost")

    source = source_of(vm, inn.open(), on_event=write_unmarked)
    with pytest.raises(
        MigrationError, match=f"gfn {STRAY_GFN:#x} changed in round 0; .*MarksNothing lost it"
    ) as failed:
        source.run()
    assert failed.value.guest_at is GuestAt.SOURCE
    assert isinstance(failed.value.__cause__, LostPageError)
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


CUTS = [0, 10, 48, 100, 300, 500, 5_000, 150_000]


@pytest.mark.parametrize(
    "cut_after_bytes", sample(CUTS, "a cut before, in and after the hello", quick=[0, 300, 150_000])
)
def test_a_cut_leaves_the_guest_here(running, inn, wires, cut_after_bytes):
    vm = running()
    wire = wires(inn.open(), cut_after_bytes=cut_after_bytes or 1)
    source = source_of(vm, wire.uri)
    with pytest.raises(MigrationError) as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.SOURCE
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


@pytest.mark.parametrize(
    "frame", [FrameType.DESTINATION_HELLO, FrameType.DIGESTS, FrameType.READY], ids=lambda f: f.name
)
def test_a_cut_before_the_commit_leaves_the_guest_here(running, inn, wires, frame):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(frame))
    source = source_of(vm, wire.uri)
    with wire.cut_when_held(), pytest.raises(TransportError, match="cut"):
        source.run()
    wire.release()
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


def test_a_stall_is_noticed(running, inn, wires):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.READY))
    source = source_of(vm, wire.uri, timeout_s=0.5)
    with pytest.raises(TransportError, match=r"stood still for 0\.5 s"):
        source.run()
    wire.cut()
    wire.release()
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_a_refusal_carries_its_reason_and_hint(guests, inn):
    vm = guests()
    vm.resume()
    plain = inn.make_vm

    def refuse(config):
        raise UsageError("guests have one vCPU here", hint="ask elsewhere")

    inn.make_vm = refuse
    source = source_of(vm, inn.open())
    with pytest.raises(PeerError, match="guests have one vCPU here") as caught:
        source.run()
    assert caught.value.hint == "ask elsewhere"
    inn.outcome()
    inn.make_vm = plain
    expect_as_before(vm, inn, source)


def test_a_host_without_room_refuses_before_the_first_page(running, inn):
    vm = running()
    inn.kind = AlteredDestination.having({"room.available_bytes": lambda: 40_000})
    source = source_of(vm, inn.open())
    with pytest.raises(PeerError, match=r"this host has 39\.06 KiB available") as caught:
        source.run()
    assert caught.value.phase == "hello"
    inn.outcome()
    inn.kind = Destination
    expect_as_before(vm, inn, source)


class UnreadableWhenFrozen(Faithful):
    """Cannot be read while the guest is frozen."""

    def peek(self):
        self._expect_running()
        return super().peek()

    def stats(self):
        self._expect_running()
        return super().stats()

    def _expect_running(self):
        if self._vm.run_control.held:
            raise VmError("the log cannot be read")


def test_a_tracker_that_fails_while_the_guest_is_frozen_cannot_keep_it_so(running, inn):
    vm = running()
    sound = vm.log_dirty
    vm.replace_tracker(UnreadableWhenFrozen(vm))
    source = source_of(vm, inn.open(), XenPolicy(max_rounds=1))
    with pytest.raises(MigrationError, match="cannot be read"):
        source.run()
    vm.replace_tracker(sound)
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_a_peer_that_trickles_is_a_stalled_one(guests, inn):
    vm = guests()
    vm.resume()
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle():
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.sendall(PREAMBLE + struct.pack("<II", FrameType.DESTINATION_HELLO, 30_000))
                while not stop.wait(0.05):
                    sock.sendall(b" ")

        thread = threading.Thread(target=trickle)
        thread.start()
        source = source_of(vm, f"tcp://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5)
        with pytest.raises(TransportError, match="stood still"):
            source.run()
        stop.set()
        thread.join()
    expect_as_before(vm, inn, source)


def test_a_cancel_ends_a_connect_without_an_answer(guests, inn):
    vm = guests()
    vm.resume()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        full = [socket.socket() for _ in range(3)]
        for sock in full:
            sock.setblocking(False)
            sock.connect_ex(silent.getsockname())
        source = source_of(vm, f"tcp://127.0.0.1:{silent.getsockname()[1]}", timeout_s=600)
        failures = []

        def run():
            try:
                source.run()
            except PolicyAbort as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert source.job.cancel()
        thread.join(60)
        assert "cancelled" in str(failures[0])
        for sock in full:
            sock.close()
    expect_as_before(vm, inn, source)


def test_a_cancel_leaves_the_guest_here(running, inn):
    vm = running("hotset")
    source = source_of(vm, inn.open(), Rounds(FOREVER, lambda index: source.job.cancel() if index == 2 else None))
    with pytest.raises(PolicyAbort, match="cancelled"):
        source.run()
    inn.outcome()
    assert source.job.report.status == "cancelled"
    expect_as_before(vm, inn, source)


def test_a_policy_that_gives_up_leaves_the_guest_here(running, inn):
    vm = running("hotset")
    source = source_of(vm, inn.open(), DowntimePolicy(limit_s=1e-9))
    with pytest.raises(PolicyAbort, match="verification alone"):
        source.run()
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_a_guest_that_ends_during_the_migration_stays_ended(running, inn):
    vm = running("stamp")

    def crash(index):
        vm.freeze()
        state = vm.save_state()
        vm.thaw()
        vm.pause()
        vm.load_state(replace(state, vcpus=(replace(state.vcpus[0], rip=0x7FFF_0000_0000),)))
        vm.resume()
        assert vm.wait(60) is VmStatus.CRASHED

    with pytest.raises(PolicyAbort, match="the guest ended meanwhile"):
        source_of(vm, inn.open(), Rounds(FOREVER, crash)).run()
    inn.outcome()
    assert vm.status is VmStatus.CRASHED


def test_a_machine_without_a_balloon_refuses_what_it_cannot_hold(make_vm, inn, kvm_support):
    source = Domain(VmConfig(memory_bytes=32 << 20))
    boot(source, load_workload("idle"))
    source.physmap.decrease_reservation(np.arange(6000, 6100, dtype=np.uint64))
    source.resume()
    inn.make_vm = KvmVm
    with pytest.raises(PeerError, match="gave 100 pages back cannot live on kvm") as caught:
        source_of(source, inn.open()).run()
    assert caught.value.hint == "receive it with --accel soft"
    inn.outcome()
    assert runs_on(source)
    source.close()


@pytest.mark.parametrize(
    ("says", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not pageferry.*HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not pageferry.*SSH"),
        (b"", "cut|closed"),
        (b"\x89PGFERRY" + struct.pack("<II", 99, 0), "version 99"),
        (PREAMBLE + struct.pack("<II", FrameType.READY, 0), "may not"),
        (
            PREAMBLE + struct.pack("<II", FrameType.DESTINATION_HELLO, 0xFFFF_FFFF),
            "longer than",
        ),
    ],
    ids=["http", "ssh", "silent", "future", "order", "length"],
)
def test_a_listener_that_is_not_pageferry(guests, inn, says, match):
    vm = guests()
    vm.resume()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.sendall(says)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        source = source_of(vm, f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(MigrationError, match=match):
            source.run()
        thread.join()
    expect_as_before(vm, inn, source)


def test_no_process_listens(guests, inn):
    vm = guests()
    vm.resume()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    source = source_of(vm, f"tcp://127.0.0.1:{port}")
    with pytest.raises(TransportError, match="cannot connect"):
        source.run()
    expect_as_before(vm, inn, source)


def test_a_source_that_lies_about_pages_is_refused(inn, make_vm):
    """A record that names a gfn outside the guest, sent by a peer that is otherwise correct."""
    channel = inn.open().connect(10)
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    peer.send(
        SourceHello(version=__version__, memory_bytes=32 << 20, cpus=1, accel="soft", cpuid=SOFT_CPU, migration_id="x")
    )
    peer.receive()
    encoder = Encoder()
    static = encoder.header(), encoder.record(CpuidPolicy(leaves=SOFT_CPU)), encoder.record(StaticDataEnd())
    channel.send([*static, encoder.page_data(np.array([(32 << 20) >> 12]))])
    with pytest.raises(PeerFailedError, match="gfn 0x2000"):
        peer.receive()
    channel.close()
    error = inn.outcome()
    assert isinstance(error, PeerError)
    assert error.guest_at is GuestAt.SOURCE
