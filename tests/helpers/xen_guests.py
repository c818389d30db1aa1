"""Domains of real Xen for tests: made by ``xl``, then filled with a program of the guest ABI.

``xl`` makes a PVH domain of a kernel that does nothing, and leaves it paused. Its memory is then replaced by a
program's, and its vCPU's state by the ABI's entry state. Without a device model the ports of the ABI read all ones:
programs that need no answer run, and count their work in the status page.
"""

import contextlib
import errno
import os
import signal
import struct
import subprocess
import time
import traceback
from dataclasses import replace
from pathlib import Path

import forkserver
import numpy as np
import pytest
from kernels import elf, note

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import MigrationError, XenError
from pageferry.core.events import PhaseBegan, RoundEnded
from pageferry.core.policy_names import make_policy
from pageferry.guests import abi
from pageferry.guests.boot import GuestParams, plan
from pageferry.guests.workloads import load_workload
from pageferry.stream.hvm_context import encode_cpu
from pageferry.stream.hvm_entries import Typecode, join_entries, split_entries
from pageferry.xen import uapi
from pageferry.xen.domain import XenDomain, read_configuration
from pageferry.xen.domains import list_domains
from pageferry.xen.domctl import Control
from pageferry.xen.foreign import map_foreign
from pageferry.xen.migrate import XenMigration
from pageferry.xen.receiver import GO, Receiver
from pageferry.xen.save import XenSave
from pageferry.xen.store import XenStore
from pageferry.xen.undo_log import sweep

_ENTRY = 0x20_0000
_HALT = b"\xfa\xf4\xeb\xfc"  # cli; hlt; again
GIVE_UP_S = 300.0
#: What most tests call their domain.
NAME = "pageferry-test"
#: Of the domains that most tests make.
MEMORY_BYTES = 12 << 20
RECEIVE = ["xl", "migrate-receive"]
#: What the commands of a dom0 load. To load all of pageferry takes half a minute where that is emulated.
forkserver.PRELOADED = [
    "pageferry.cli.main",
    "pageferry.cli.commands.xen",
    "pageferry.cli.commands.migrations",
    "pageferry.cli.xen_source",
    "pageferry.core.os_hints",
]


def idle_kernel(folder):
    """Write a kernel with a PVH note that halts; return its path."""
    path = Path(folder) / "halts"
    notes = note(b"Xen", 18, struct.pack("<I", _ENTRY))
    path.write_bytes(elf((_ENTRY, _HALT, 0x1000), bits=32, entry=_ENTRY, notes=notes))
    return path


def xl(*arguments, check=True):
    """Run ``xl``; return what it prints on standard output."""
    done = subprocess.run(["xl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert not check or not done.returncode, f"xl {arguments} failed: {done.stdout}{done.stderr}"
    return done.stdout


def pageferry(*arguments, code=0, env=None):
    """Run a command; return what it printed.

    It begins as a fork of a process that has loaded all of it: to load it takes some 7 s in an emulated dom0.
    """
    with forkserver.start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        out, err = process.communicate()
    assert process.returncode == code, f"{process.returncode}: {out}{err}"
    return out if not code else err


def log_dirty_is_off(control, domid):
    """Find out by turning it on."""
    try:
        control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
    except XenError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)
    return True


def create(folder, name, *, memory_mib=16, vcpus=1, kernel=None, more="", kind="pvh", paused=True):
    """Make a domain; return its number. One of kind "hvm" has a device model, and boots no kernel."""
    config = Path(folder) / f"{name}.cfg"
    boots = "" if kind == "hvm" else f'kernel = "{kernel or idle_kernel(folder)}"\n'
    config.write_text(
        f'name = "{name}"\ntype = "{kind}"\n{boots}memory = {memory_mib}\n'
        f'vcpus = {vcpus}\non_crash = "preserve"\non_reboot = "preserve"\non_poweroff = "preserve"\n{more}\n'
    )
    xl("create", *(["-p"] if paused else []), config)
    return domid_of(name)


def domid_of(name):
    """The number of the domain of that name."""
    return int(xl("domid", name))


def destroy(name):
    """Destroy a domain, if it is there."""
    xl("destroy", name, check=False)


def destroy_all():
    """Destroy the domain of that name, and what a migration of it left."""
    for line in xl("list").splitlines()[1:]:
        if line.startswith(NAME):
            destroy(line.split()[0])


def low_memory(control, domid, memory_bytes, *, writable=True):
    """The first so many bytes of a domain's memory."""
    pages = memory_bytes >> 12
    present = DirtyBitmap(pages)
    present.set_range(0, pages)
    return map_foreign(control, domid, present, writable=writable)


def set_hvm_context(control, domid, context):
    """Replace the entries that an HVM context has in a paused domain."""
    buffer = control.privcmd.buffer(len(context))
    buffer.bytes[:] = np.frombuffer(context, np.uint8)

    def fill(u):
        u.hvmcontext.size, u.hvmcontext.buffer = len(context), buffer.hva

    control._do(uapi.XEN_DOMCTL_sethvmcontext, domid, fill)


def load_vcpus(control, domid, vcpus):
    """Replace the vCPUs' registers of a paused domain."""
    entries = []
    states = {index: encode_cpu(vcpu) for index, vcpu in enumerate(vcpus)}
    for entry in split_entries(control.hvm_context(domid)):
        if entry.typecode == Typecode.CPU:
            entry = replace(entry, body=states[entry.instance])
        if entry.typecode in (Typecode.HEADER, Typecode.CPU, Typecode.END):
            entries.append(entry)
    set_hvm_context(control, domid, join_entries(entries))


def entry_state(entry):
    """The ABI's entry state, as QEMU's emulation of SVM wants the task state segment (see pageferry.kvm.tss)."""
    state = abi.entry_state(entry, 0)
    return replace(state, tr=replace(state.tr, attributes=0x89))


def load_program(control, domid, workload, memory_bytes, *, params=None):
    """Put a program into a paused domain of one vCPU; return its memory (writable) and what it was told."""
    memory = low_memory(control, domid, memory_bytes)
    np.frombuffer(memory.mapping.view, np.uint8)[:memory_bytes] = 0
    program = load_workload(workload)
    info = plan(program, memory, cpus=1, params=params or GuestParams())
    for segment in program.segments:
        memory.write(segment.gpa, segment.data)
    memory.write(abi.PAGE_TABLES_GPA, abi.page_tables(memory_bytes))
    memory.write(abi.INFO_GPA, info.pack())
    load_vcpus(control, domid, [entry_state(program.entry)])
    return memory, info


def wait_for_work(memory, more=1):
    """Wait until the guest has done some more of its work; return its status."""
    begun = abi.read_work(memory, 1)
    until = time.monotonic() + GIVE_UP_S
    while abi.read_work(memory, 1) < begun + more:
        assert time.monotonic() < until, f"the guest makes no progress: {abi.read_status(memory, 1)}"
        time.sleep(0.01)
    (status,) = abi.read_status(memory, 1)
    assert status.error == 0, status
    return status


def saving(control, store, domid, path, *, on_event=lambda event: None, rounds=None, stop=False):
    """A domain, and an attempt to save it."""
    info = control.info(domid)
    domain = XenDomain(control, store, info)
    configuration = read_configuration(info)
    attempt = XenSave(domain, configuration, path, make_policy("xen", max_rounds=rounds), stop=stop, on_event=on_event)
    return domain, attempt


def moving(control, store, domid, command=RECEIVE, *, on_event=lambda event: None, rounds=None):
    """A domain, and an attempt to move it."""
    info = control.info(domid)
    domain = XenDomain(control, store, info)
    configuration = read_configuration(info)
    return domain, XenMigration(
        domain, configuration, command, make_policy("xen", max_rounds=rounds), on_event=on_event
    )


def run_cancelled(phase, make):
    """Run what :func:`saving` or :func:`moving` makes, and cancel it when a phase begins; return the error.

    ``make`` is called with ``on_event`` and ``rounds``.
    """

    def cancel(event):
        if isinstance(event, PhaseBegan) and event.phase == phase:
            attempt.job.cancel()

    domain, attempt = make(on_event=cancel, rounds=1)
    with contextlib.closing(domain), pytest.raises(MigrationError) as failed:
        attempt.run()
    return failed.value


#: Where a process is killed besides the beginnings of phases: after what was called, and with what.
MOMENTS = {
    "asked": (XenStore, "write", lambda path, value: value == "suspend"),
    "given-away": (XenDomain, "give_away", lambda: True),
    "told": (Receiver, "send", lambda buffers: buffers == [GO]),
    "gone": (XenDomain, "gone", lambda: True),
}


def run_killed(moment, domid, *, path=None):
    """Save a domain to a path, or move it, in a process that is killed at a moment: a phase, "first-round", one of
    MOMENTS, or "end": when the attempt is over, and the domain not given back yet.
    """
    pid = os.fork()
    if not pid:
        try:
            _run_killed(moment, domid, path)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "it was not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL


def _run_killed(moment, domid, path):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event):
        if isinstance(event, PhaseBegan) and event.phase == moment:
            die()
        if isinstance(event, RoundEnded) and moment == "first-round":
            die()

    if moment in MOMENTS:
        owner, name, fits = MOMENTS[moment]
        original = getattr(owner, name)

        def replaced(self, *arguments):
            original(self, *arguments)
            if fits(*arguments):
                die()

        setattr(owner, name, replaced)
    with Control() as control, XenStore() as store:
        make = saving if path else moving
        _, attempt = make(control, store, domid, path or RECEIVE, on_event=on_event, rounds=1)
        attempt.run()
        die()


def seen(control, store, domid):
    """A domain as ``pageferry xen list`` shows it, which begins with undoing what a killed process left."""
    sweep(control)
    (found,) = [each for each in list_domains(control, store) if each.domid == domid]
    return found
