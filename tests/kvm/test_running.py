"""Running, pausing and ending a guest: exactness at every stop."""

import signal
import threading

import pytest

from pageferry.core.errors import GuestCrash, VmError
from pageferry.core.run import SyncPoint
from pageferry.core.vm import GuestEnd, VmStatus
from pageferry.kvm.kick import kick_signal

pytestmark = pytest.mark.kvm


def test_200_pauses_lose_nothing_and_leave_no_io_half_done(kvm):
    gate = kvm.Gate()
    vm = kvm.guest("exact", devices=[gate])
    places = set()
    for _ in range(200):
        before = gate.count
        vm.resume()
        kvm.wait_for(vm, lambda before=before: gate.count > before)
        vm.pause()
        (state,) = vm.save_state().vcpus
        rip = state.rip - kvm.PROGRAM_GPA
        places.add(rip)
        # Which of the loop's instructions are done, told by rip alone, must agree with what the device has seen.
        outs = state.rbx - (rip in (9, 11))  # after inc, before out
        reads = state.rbx - (rip in (9, 11, 12))  # ... and before in
        assert (gate.count, gate.reads) == (outs, reads), f"stopped at +{rip}"
        if rip in (7, 13, 15, 17, 25):  # after in: its result is in eax
            assert state.rax == gate.count
    assert vm.status is VmStatus.PAUSED
    assert places


def test_one_kick_is_enough_once_inside(kvm):
    vm = kvm.guest("spin")
    (vcpu,) = vm.vcpus
    for attempt in range(300):
        thread = threading.Thread(target=vcpu.run, daemon=True)
        thread.start()
        while vcpu._thread_ident is None and thread.is_alive():
            pass
        vcpu.kick()
        thread.join(60)
        assert not thread.is_alive(), f"kick {attempt} was lost"


def test_a_kick_with_no_vcpu_inside_does_nothing(kvm):
    vm = kvm.guest("sync")
    vm.attach_sync(True)
    vm.vcpus[0].kick()
    assert vm.vcpus[0].run() is not None  # not stopped by the old kick


def test_a_guest_made_and_run_by_another_thread_is_paused_by_this_one(kvm):
    made = []

    def make():
        made.append(kvm.guest("stamp", rdi=kvm.DATA_GPA, rsi=1))
        made[0].resume()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    kvm.wait_for(made[0], lambda: made[0].memory.read_u64(kvm.DATA_GPA))
    made[0].pause()
    first = made[0].save_state()
    assert first.vcpus[0].rbx > 0
    assert made[0].save_state().vcpus[0].rip == first.vcpus[0].rip  # it stands still


def test_the_kick_signal_is_handled_and_not_by_python(kvm_support):
    number = kick_signal()
    assert number >= signal.SIGRTMIN
    assert signal.getsignal(number) in (None, signal.SIG_DFL)  # as Python sees it, none was set
    signal.pthread_kill(threading.get_ident(), number)  # would end the process if there were none
    assert kick_signal() == number


def test_sync_points_pause_and_answer(kvm):
    vm = kvm.guest("sync")
    vm.attach_sync(True)
    vm.resume()
    assert vm.wait(60) is VmStatus.PAUSED
    assert vm.sync_value() == 7
    vm.reply_sync(30)
    vm.resume()
    assert vm.wait(60) is VmStatus.PAUSED
    assert vm.sync_value() == 31
    vm.reply_sync(12)
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end == GuestEnd(exit_code=42)
    with pytest.raises(VmError, match="has ended"):
        vm.resume()


def test_at_a_sync_point_the_instruction_is_complete(kvm):
    vm = kvm.guest("sync")
    vm.attach_sync(True)
    vm.resume()
    vm.wait(60)
    assert vm.save_state().vcpus[0].rip == kvm.PROGRAM_GPA + 7  # after the OUT


def test_unattached_sync_points_are_passed_over(kvm):
    vm = kvm.guest("sync")
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert vm.end == GuestEnd(exit_code=1 + 2)


def test_string_instructions_move_every_element(kvm):
    gate = kvm.Gate()
    gate.count = 5
    vm = kvm.guest("strings", devices=[gate])
    output = bytearray()
    vm.on_console(output.extend)
    vm.resume()
    assert vm.wait(60) is VmStatus.SHUTDOWN
    assert output == b"hello"
    assert gate.reads == 4
    assert vm.end == GuestEnd(exit_code=20)


class Store:
    """Device memory at the addresses of the program ``mmio``; its first write has an effect if one is given."""

    name = "store"
    ports = range(0)
    mmio = range(0xFD00_0000, 0xFD00_2000)

    def __init__(self, effect=None):
        self.data = bytearray(0x2000)
        self.effect = effect

    def read(self, offset, size):
        assert size in (1, 2, 4, 8)
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset, size, value):
        assert size in (1, 2, 4, 8)
        self.data[offset : offset + size] = value.to_bytes(size, "little")
        effect, self.effect = self.effect, None
        return effect

    def save(self):
        return b""

    def load(self, data):
        pass


def test_mmio_of_every_size_and_over_a_page_end(kvm):
    vm = kvm.guest("mmio", devices=[Store()])
    vm.resume()
    vm.wait(60)
    assert vm.end == GuestEnd(exit_code=0)


def test_an_effect_waits_for_the_rest_of_its_instruction(kvm):
    """A store over the end of a page arrives in two exits; the effect of the first must not leave the second undone."""
    store = Store(SyncPoint(3))
    vm = kvm.guest("mmio", devices=[store])
    vm.resume()
    assert vm.wait(60) is VmStatus.PAUSED
    assert vm.sync_value() == 3
    assert store.data[0xFFD:0x1005] == (0x1122334455667788).to_bytes(8, "little")
    vm.resume()
    vm.wait(60)
    assert vm.end == GuestEnd(exit_code=0)


def test_a_waiting_guest_can_be_paused_and_goes_on(kvm):
    vm = kvm.guest("wait")
    write, asked = vm.platform.clock.write, threading.Event()

    def write_and_tell(*arguments):
        asked.set()
        return write(*arguments)

    vm.platform.clock.write = write_and_tell
    vm.resume()
    asked.wait(60)
    vm.pause()
    assert vm.save_state().vcpus[0].rip == kvm.PROGRAM_GPA + 7  # after the OUT
    vm.resume()
    vm.wait(60)
    assert vm.end == GuestEnd(exit_code=9)


def test_a_crash_is_one_clear_line(kvm):
    vm = kvm.guest("crash")
    vm.resume()
    assert vm.wait(60) is VmStatus.CRASHED
    line = vm.end.crash
    assert "triple fault" in line
    assert "\n" not in line
    assert "registers are lost" in line or f"rip={kvm.PROGRAM_GPA + 10:#x}" in line
    assert "registers are lost" in line or "cr2=0x123456789000" in line


def test_an_undefined_instruction_crashes_too(kvm):
    vm = kvm.guest("undefined")
    with pytest.raises(GuestCrash, match="vcpu 0"):
        vm.vcpus[0].run()


def test_two_vcpus_run_at_once_and_both_stop(kvm):
    first, second = kvm.DATA_GPA, kvm.DATA_GPA + 0x1_0000
    states = (kvm.start_state(rdi=first, rsi=1), kvm.start_state(rdi=second, rsi=2))
    vm = kvm.guest("stamp", vcpus=states)
    for _ in range(20):
        before = vm.save_state().vcpus
        vm.resume()
        kvm.wait_for(vm, lambda: min(map(vm.memory.read_u64, (first, second))) > 1)  # r8 counts what was finished
        vm.pause()
        after = vm.save_state().vcpus
        assert [v.rdi for v in after] == [first, second]
        assert all(b.r8 <= a.r8 for b, a in zip(before, after, strict=True))
    assert all(v.r8 > 0 for v in after)


def test_closing_a_running_guest_and_closing_twice(kvm):
    vm = kvm.guest("spin")
    vm.resume()
    vm.close()
    vm.close()
    with pytest.raises(VmError):
        vm.vm_fd.check_extension(0)
