"""What the tests share: machines of both kinds, and a wire that can be cut, held and listened to."""

import contextlib
import fcntl
import functools
import os
import random
import secrets
import signal
import subprocess
import weakref
from pathlib import Path

import machines
import pytest
from hypothesis import settings
from machines import KINDS
from processes import command
from proxy import Wire
from tiers import sample
from trips import LOOPBACK, Inn

from pageferry.core.errors import KvmError, UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hugepages import HugePages, expect_offered
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.paging import Paging
from pageferry.kvm.fds import SystemFd
from pageferry.kvm.probe import probe
from pageferry.kvm.trackers import ring_tracker
from pageferry.kvm.vm import KvmVm

MiB = 1 << 20

settings.register_profile("pageferry", deadline=None, print_blob=True)
settings.load_profile("pageferry")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """One seed decides all chance of a run: Hypothesis's own option, which every worker is handed."""
    heed_signals()
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = secrets.randbits(32)


def heed_signals():
    """A run that a shell put into the background ignores Ctrl-C, and so would every process that a test starts."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_report_header(config):
    return f"seed: {config.option.hypothesis_seed} (make test SEED={config.option.hypothesis_seed} repeats it)"


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("exhaustive"):
            if not mark.args:
                raise pytest.UsageError(f"{item.nodeid} is exhaustive and does not say why")


@pytest.fixture
def dice(request):
    """Chance, decided by the run's seed for each test by itself, whatever runs before it."""
    return random.Random(f"{request.config.option.hypothesis_seed} {request.node.nodeid}")


@pytest.fixture(autouse=True)
def audited_domains(request, monkeypatch):
    """Audit every Domain when it is closed; in the tests of the software hypervisor after each operator too."""
    path = request.node.path
    ours = path.parent.name == "hypervisor" or path.parent.name == "property"
    if (ours or path.name == "test_log_dirty.py") and request.node.get_closest_marker("spoils_the_table") is None:
        audit_domains(monkeypatch, operators=("enable", "peek", "clean", "off") if ours else ())


def audit_domains(monkeypatch, operators):
    domains = weakref.WeakKeyDictionary()  # by their Paging, which knows of no domain

    def made(init, domain, *args, **options):
        init(domain, *args, **options)
        domains[domain.paging] = domain

    def operated(operator, paging):
        result = operator(paging)
        invariants.check(domains[paging])
        return result

    def closed(close, domain):
        if not domain._closed:
            invariants.check(domain)
        close(domain)

    for owner, name, wrapper in (
        (Domain, "__init__", made),
        (Domain, "close", closed),
        *((Paging, name, operated) for name in operators),
    ):
        monkeypatch.setattr(owner, name, functools.partialmethod(_call, wrapper, getattr(owner, name)))


def _call(self, wrapper, method, *args, **options):
    return wrapper(method, self, *args, **options)


@pytest.fixture(scope="session")
def kvm_support():
    try:
        return probe()
    except (UnsupportedError, VmError) as error:
        if os.environ.get("PAGEFERRY_REQUIRE_KVM") == "1":
            pytest.fail(f"PAGEFERRY_REQUIRE_KVM=1, but {error} ({error.hint})")
        pytest.skip(f"no usable KVM: {error} ({error.hint})")


@pytest.fixture(scope="session")
def smallest_ring_bytes(kvm_support):
    """The size of the smallest dirty ring that this kernel makes (it keeps room for what a CPU logs by itself)."""
    for size_bytes in (PAGE_SIZE << shift for shift in range(9)):
        with SystemFd() as system, system.create_vm() as vm:
            try:
                ring_tracker(size_bytes).prepare(vm)
            except UnsupportedError as error:
                pytest.skip(f"{error} ({error.hint})")
            except KvmError:
                continue
            return size_bytes
    return pytest.fail("this kernel offers dirty rings and makes none")


@pytest.fixture(params=["kvm", "soft"])
def accel(request):
    if request.param == "kvm":
        request.getfixturevalue("kvm_support")
    return request.param


@pytest.fixture(
    params=sample(["kvm", "soft"], "a process is the same around either machine", quick=["soft"]),
)
def process_accel(request):
    """The accel of guests that live in processes of their own, which are dear."""
    if request.param == "kvm":
        request.getfixturevalue("kvm_support")
    return request.param


@pytest.fixture
def make_vm(accel):
    """Makes a machine of the accel under test from a VmConfig."""
    return KvmVm if accel == "kvm" else Domain


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    """Every kind of machine, with each of its trackers."""
    try:
        machines.expect_works(request.param)
    except (UnsupportedError, VmError) as error:
        pytest.skip(f"{request.param.name}: {error}")
    return request.param


@pytest.fixture
def guests(make_vm):
    """Makes booted, paused guests of the accel under test, and closes them."""
    made = []

    def make(
        workload="kv",
        *,
        memory_bytes=32 * MiB,
        cpus=1,
        working_set_bytes=4 * MiB,
        machine=MachineModel.PLAIN,
        devices=(),
        **params,
    ):
        vm = make_vm(VmConfig(memory_bytes=memory_bytes, cpus=cpus, machine=machine, devices=devices))
        made.append(vm)
        boot(vm, load_workload(workload), params=GuestParams(working_set_bytes=working_set_bytes, **params))
        return vm

    yield make
    for vm in made:
        if isinstance(vm, Domain) and not vm.closed:
            invariants.check(vm)
        vm.close()


@contextlib.contextmanager
def kernel_setting(path, read, change):
    """Change a setting of the host for the length of a block, one process at a time; skip where that is forbidden.

    ``read()`` tells what to write to restore it, ``change(that)`` what to write now.
    """
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            old = read()
            path.write_text(change(old))
            try:
                yield
            finally:
                path.write_text(old)
    except OSError as error:
        pytest.skip(f"{path} cannot be changed here: {error}")


@pytest.fixture
def thp():
    """The kernel takes advice on huge pages for memfds."""
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    with kernel_setting(path, lambda: path.read_text().partition("[")[2].partition("]")[0], lambda old: "advise"):
        try:
            expect_offered(HugePages.THP)
        except UnsupportedError as error:
            pytest.skip(f"no 2 MiB page to be had: {error} ({error.hint})")
        yield


POOL_PAGES = 12


@pytest.fixture
def hugetlb_pool():
    """A pool with at least ``POOL_PAGES`` 2 MiB pages left; tells how many. Name it before whatever uses pages."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

    def number(name):
        return int((pool / f"{name}_hugepages").read_text())

    def left():
        return number("free") - number("resv")

    with kernel_setting(
        pool / "nr_hugepages",
        lambda: str(number("nr") - number("surplus")),  # surplus: still in use, though no longer set aside
        lambda old: str(int(old) + POOL_PAGES),
    ):
        if left() < POOL_PAGES:
            pytest.skip(f"the host could set aside only {left()} pages of 2 MiB")
        yield left


@pytest.fixture
def inns():
    """Opens destinations, and closes them."""
    made = []

    def open_one(make_vm, endpoint=LOOPBACK):
        made.append(Inn(make_vm, endpoint))
        return made[-1]

    yield open_one
    for inn in made:
        inn.close()


@pytest.fixture
def wires():
    """Makes wires to an Endpoint, and closes them."""
    made = []

    def make(endpoint, **options):
        made.append(Wire(endpoint, **options))
        return made[-1]

    yield make
    for wire in made:
        wire.close()


@pytest.fixture
def here(capfd):
    """Runs commands in this process, those too that run a guest."""

    def run(*arguments):
        code = command(*arguments)
        said = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return run
