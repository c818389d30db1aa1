"""A stock Linux on the software machine: it boots in every way, works, and goes on working wherever it is moved."""

import re
import sys
from functools import partial

import pytest
from kernels import vmlinux_of
from linux_guest import Said
from linux_image import READY, linux_image
from processes import cli
from tiers import sample
from trips import source_of

from pageferry.core.policies import ConvergePolicy, DeadlinePolicy, DowntimePolicy, PostcopyPolicy, XenPolicy
from pageferry.core.policy import Action, Decision
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine.image.restore import restore
from pageferry.engine.image.save import Save
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.debian import KERNELS
from pageferry.guests.linux.image import load_kernel
from pageferry.guests.loader import KernelOptions, named
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.paging import PAGING_MODES
from pageferry.witness.cross_check import findings
from pageferry.witness.machines import with_digests

pytestmark = pytest.mark.timeout(900)

MEMORY_BYTES = 128 << 20
PATIENCE_S = 600


@pytest.fixture
def linux():
    """Makes machines of one CPU with ``load`` to start them; closes them and all that is given to it."""
    made = []

    def make(load, said, mode=PAGING_MODES[0], wrap=lambda make_vm: make_vm):
        vm = wrap(partial(Domain, paging_mode=mode))(VmConfig(memory_bytes=MEMORY_BYTES, machine=MachineModel.PC))
        made.append(vm)
        said.listen_to(vm)
        load(vm)
        vm.resume()
        return vm

    make.also = made.append
    yield make
    for vm in made:
        vm.close()


def loader(image, command_line):
    kernel, initrd = load_kernel(image.kernel), image.initramfs.read_bytes()
    return partial(boot_linux, kernel=kernel, initrd=initrd, command_line=f"console=ttyS0 quiet {command_line}")


def until_ready(said):
    said.wait_for(lambda: READY in bytes(said), "first process", PATIENCE_S)


class UntilReady:
    """A policy that makes a round each time the guest has said more, until its first process is ready."""

    name = "until ready"
    limit_s = None

    def __init__(self, said):
        self._said = said
        self._heard = 0

    def decide(self, progress):
        """Wait for more, not so long that the other end gives up."""
        self._said.wait_for_more(self._heard + 500, 20)
        said = bytes(self._said)
        self._heard = len(said)
        ready = READY in said
        return Decision(action=Action.STOP_AND_COPY if ready else Action.NEXT_ROUND, reason="it has said more")


def type_line(vm, text):
    data = text.encode() + b"\n"
    while data:
        data = data[vm.type_console(data) :]


@pytest.mark.parametrize("mode", sample(PAGING_MODES, "the kit is over both modes", quick=["hap"]))
def test_it_works_through_three_moves_and_a_file(linux, inns, tmp_path, mode):
    said = Said()
    vm = linux(loader(linux_image(), "pageferry=work"), said, mode)
    until_ready(said)
    said.works_on()
    inn = inns(partial(Domain, paging_mode=mode))
    for _ in range(3):
        report = source_of(vm, inn.open(before_run=said.listen_to)).run()
        assert report.verified
        vm = inn.outcome()
        assert not isinstance(vm, Exception), vm
        said.works_on()
    path = tmp_path / "guest.bin"
    Save(vm, path, XenPolicy(), stop=True, on_event=lambda _: None).run()
    with SavedGuest(path) as saved:
        vm = restore(saved, partial(Domain, paging_mode=mode))
        linux.also(vm)
        said.listen_to(vm)
        vm.resume()
        said.works_on()


@pytest.mark.exhaustive("policies have tests with small guests; a Linux moves in every run")
@pytest.mark.parametrize("mode", PAGING_MODES)
def test_every_policy_moves_it_while_it_works(linux, inns, mode):
    said = Said()
    vm = linux(loader(linux_image(), "pageferry=work"), said, mode)
    until_ready(said)
    said.works_on()
    policies = [
        *(XenPolicy(), DowntimePolicy(limit_s=30.0), ConvergePolicy(limit_s=5.0), DeadlinePolicy(deadline_s=10.0)),
        PostcopyPolicy(max_rounds=1, limit_s=1e-3),
    ]
    inn = inns(partial(Domain, paging_mode=mode))
    for policy in policies:
        report = source_of(vm, inn.open(before_run=said.listen_to), policy).run()
        assert (report.status, report.policy, report.verified) == ("completed", policy.name, True)
        vm = inn.outcome()
        assert not isinstance(vm, Exception), vm
        said.works_on()
    assert report.postcopy is not None


@pytest.mark.exhaustive("the witness has tests with small guests")
@pytest.mark.parametrize("mode", PAGING_MODES)
def test_a_witness_agrees_with_the_tracker_while_it_boots(linux, inns, mode):
    said = Said()
    vm = linux(loader(linux_image(), "loglevel=7"), said, mode, with_digests)
    said.wait_for(lambda: b"Linux version" in bytes(said), "word of the kernel", PATIENCE_S)
    inn = inns(with_digests(partial(Domain, paging_mode=mode)))
    report = source_of(vm, inn.open(before_run=said.listen_to), UntilReady(said)).run()
    assert report.verified
    compared = findings(vm.log_dirty)
    assert compared["trackers"] == f"{mode} against digests"
    assert compared["rounds"] > 10
    assert compared["pages"] > 1000
    vm = inn.outcome()
    assert not isinstance(vm, Exception), vm
    type_line(vm, "echo six times seven is $((6 * 7))")
    said.wait_for(lambda: b"six times seven is 42" in bytes(said), "answer", PATIENCE_S)
    said.expect_no_trouble()


@pytest.mark.exhaustive("kernels differ in how they are packed and what is a module; one is moved in every run")
@pytest.mark.parametrize("name", KERNELS)
def test_each_kernel_boots_to_a_shell_that_answers(linux, name):
    said = Said()
    vm = linux(loader(linux_image(name), ""), said)
    until_ready(said)
    type_line(vm, "echo six times seven is $((6 * 7)), of $(nproc) CPU")
    said.wait_for(lambda: b"six times seven is 42, of 1 CPU" in bytes(said), "answer", PATIENCE_S)


@pytest.mark.exhaustive("the kernel is entered in another way, and is the same from there on")
def test_a_kernel_that_cannot_be_unpacked_here_unpacks_itself(linux, monkeypatch):
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    image = linux_image()
    assert load_kernel(image.kernel).unpacks_itself
    said = Said()
    linux(loader(image, ""), said)
    until_ready(said)


@pytest.mark.exhaustive("the kernel is entered in another way, and is the same from there on")
def test_a_kernel_is_entered_by_its_pvh_note(linux, tmp_path):
    image = linux_image()
    (tmp_path / "vmlinux").write_bytes(vmlinux_of(image.kernel.read_bytes()))
    options = KernelOptions(initrd=image.initramfs, command_line="console=ttyS0 quiet")
    said = Said()
    linux(named(str(tmp_path / "vmlinux"), None, options).load, said)
    until_ready(said)


@pytest.mark.exhaustive("a demo is a run, a receive and a migrate, which have tests of their own")
def test_the_demonstration_shows_its_console_here_and_there():
    image = linux_image()
    result = cli("demo", "--linux", image.kernel.parent, "--accel", "soft", "--memory", "128M", timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    assert "     source │ work: round 3\n" in result.stderr
    assert re.search(r"^destination │ work: round \d+$", result.stderr, re.MULTILINE)
    assert "WRONG" not in result.stderr
    assert "migration completed" in result.stdout


@pytest.mark.exhaustive("a terminal and a Linux have tests of their own")
def test_a_person_works_in_its_shell_at_a_terminal(seat):
    image = linux_image()
    console = seat(
        *("run", "--kernel", image.kernel, "--initrd", image.initramfs, "--append", "console=ttyS0 quiet"),
        *("--memory", "128M", "--accel", "soft", "--console", "stdio"),
    )
    console.read_until(b"/ # ")
    console.type(b"cat\r")
    console.read_until(b"cat\r\r\n")  # the guest's terminal ends lines by both, and so does ours
    console.type(b"said again\r")
    console.read_until(b"said again\r\r\n")
    console.type(b"\x03")  # Ctrl-C is the guest's
    console.read_until(b"/ # ")
    console.type(b"echo $((6 * 7))\r")
    console.read_until(b"\n42\r")
    console.type(b"poweroff -f\r")
    assert console.wait() == 0
    assert console.settings() == console.before
