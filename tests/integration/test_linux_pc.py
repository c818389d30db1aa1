"""The PC as a stock Linux sees it: what its kernel finds, its clocks right after a move, its end. All from one boot."""

import re
import threading
import time

import pytest
from guest_shell import Terminal
from linux_image import READY, linux_image

from pageferry.core.vm import GuestEnd, MachineModel, VmConfig
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.image import load_kernel
from pageferry.hypervisor.domain import Domain

pytestmark = pytest.mark.exhaustive("another boot; test_linux has one in every run")

CONFIG = VmConfig(memory_bytes=128 << 20, machine=MachineModel.PC)
PATIENCE_S = 300
ALARM_S = 3
PAUSE_S = 4
#: A PC's CPU has no machine checks.
KNOWN_ERRORS = {"mce: Unable to init MCE device (rc: -5)"}


class Booted:
    """A guest that was booted, has set an alarm and was saved, and what it said before."""

    def __init__(self):
        image = linux_image()
        vm = Domain(CONFIG)
        try:
            kernel, initrd = load_kernel(image.kernel), image.initramfs.read_bytes()
            boot_linux(vm, kernel, initrd=initrd, command_line="console=ttyS0")
            terminal = Terminal()
            terminal.attach(vm)
            vm.resume()
            terminal.wait_for(READY)
            self.messages = terminal.run("dmesg -r")
            terminal.run(f"echo +{ALARM_S} > /sys/class/rtc/rtc0/wakealarm")
            self.alarm_set_s, asked_s = time.time(), time.monotonic()
            self.up_s = uptime(terminal)
            vm.pause()
            self._state = vm.save_state()
            #: What it would have shown at the save at the most.
            self.up_most_s = self.up_s + time.monotonic() - asked_s
            self._memory = [(region.gpa, vm.memory.read(region.gpa, region.size_bytes)) for region in vm.memory.regions]
        finally:
            vm.close()

    def arrive(self):
        """Return the guest on a machine of its own, paused."""
        vm = Domain(CONFIG)
        for gpa, data in self._memory:
            vm.memory.write(gpa, data)
        vm.load_state(self._state)
        return vm


@pytest.fixture(scope="module")
def booted():
    return Booted()


@pytest.fixture
def vm(booted):
    vm = booted.arrive()
    yield vm
    vm.close()


@pytest.fixture
def terminal(vm):
    terminal = Terminal()
    terminal.attach(vm)
    return terminal


def uptime(terminal):
    return float(terminal.run("cat /proc/uptime")[0].split()[0])


def test_the_kernel_finds_its_pc_and_does_not_complain(booted):
    messages = [re.fullmatch(r"<(\d+)>\[ *[\d.]+\] ?(.*)", line) for line in booted.messages]
    texts = [message[2] for message in messages if message]
    assert {message[2] for message in messages if message and int(message[1]) <= 3} <= KNOWN_ERRORS
    complaints = re.compile(r"ACPI (Error|Warning|BIOS|Exception)|Firmware Bug|unstable|BUG:|WARNING:|nobody cared")
    assert [text for text in texts if complaints.search(text)] == []
    for found in (
        "ACPI: PM: (supports S0 S5)",
        "ACPI: Using PIC for interrupt routing",
        "ACPI: PCI Root Bridge [PCI0] (domain 0000 [bus 00])",
        "clocksource: Switched to clocksource tsc",
        r"ttyS0 at I/O 0x3f8 (irq = 4, base_baud = 115200) is a 16550A",
        "registered as rtc0",
    ):
        assert any(found in text for text in texts), found


def test_its_clocks_are_right_as_soon_as_it_has_moved(booted, vm, terminal):
    due_s = booted.alarm_set_s + ALARM_S + 1
    while time.time() < due_s:  # the alarm comes due while the guest is nowhere
        threading.Event().wait(due_s - time.time())
    began_s, run_s = time.monotonic(), int(time.time())
    vm.resume()
    wall_s = int(terminal.run("cat /sys/class/rtc/rtc0/since_epoch")[0])
    assert run_s - 1 <= wall_s <= time.time() + 1
    up_s = uptime(terminal)
    assert booted.up_s <= up_s <= booted.up_most_s + time.monotonic() - began_s
    (alarm,) = terminal.run("grep rtc0 /proc/interrupts")
    assert int(alarm.split()[1]) == 1
    assert terminal.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == ["tsc"]


def test_its_time_stands_still_while_it_is_paused_and_the_wall_clock_goes_on(vm, terminal):
    vm.resume()
    began_s, before_s = time.monotonic(), uptime(terminal)
    vm.pause()
    threading.Event().wait(PAUSE_S)
    vm.resume()
    assert uptime(terminal) - before_s <= time.monotonic() - began_s - PAUSE_S
    assert abs(int(terminal.run("cat /sys/class/rtc/rtc0/since_epoch")[0]) - time.time()) <= PAUSE_S / 2


@pytest.mark.parametrize(
    ("command", "end"),
    [("poweroff -f", GuestEnd(exit_code=0)), ("reboot -f", GuestEnd(exit_code=0, reset=True))],
)
def test_it_ends_as_its_user_says(vm, terminal, command, end):
    vm.resume()
    terminal.type(command)
    vm.wait(PATIENCE_S)
    assert vm.end == end


def test_the_power_button_switches_the_guest_off(vm, terminal):
    vm.resume()
    if not terminal.run("ls /modules | grep evdev"):
        pytest.skip("the image is of an older release, and does not listen to its power button: make linux-image")
    vm.pause()
    vm.press_power_button()  # what is pressed now the guest hears of when it runs
    assert vm.end is None
    vm.resume()
    vm.wait(PATIENCE_S)
    assert vm.end == GuestEnd(exit_code=0)
