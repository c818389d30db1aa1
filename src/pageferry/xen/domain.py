"""XenDomain: a domain of real Xen as the guest that the engine moves: its memory, how it stands still, its state.

The engine's pause is ``pausedomain``, which counts. At the end of pre-copy the domain is *suspended* as well, as Xen's
own tools do it: a guest with Xen's drivers is asked through ``control/shutdown`` and suspends itself, so that it sets
them up anew where it goes on; any other is shut down for that reason. A suspended domain that stays is resumed: a guest
that suspended itself learns from its hypercall's result (1) that it was cancelled.

Only domains without a device model are moved (PVH): what QEMU has of an HVM guest is not read here.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.cpuid import Leaves
from pageferry.core.errors import UnsupportedError, UsageError, VmError, XenError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.state import DeviceState, MachineState
from pageferry.core.vm import AbsentPages, GuestEnd, VmConfig, VmStatus
from pageferry.stream.records import (
    CpuidPolicy,
    End,
    HvmContext,
    HvmParams,
    MsrPolicy,
    PlainRecord,
    StaticDataEnd,
    StreamHeader,
)
from pageferry.xen import uapi
from pageferry.xen.domctl import Control, DomainInfo
from pageferry.xen.foreign import map_foreign
from pageferry.xen.log import XenLogDirty
from pageferry.xen.store import XenStore
from pageferry.xen.undo_log import SUSPEND_CANCELLED, open_undo_log

USERDATA = Path("/var/lib/xen")
#: The parameters that Xen's own tools save; those that are 0 are left out.
SAVED_PARAMS = (
    uapi.HVM_PARAM_STORE_PFN,
    uapi.HVM_PARAM_IOREQ_PFN,
    uapi.HVM_PARAM_BUFIOREQ_PFN,
    uapi.HVM_PARAM_PAGING_RING_PFN,
    uapi.HVM_PARAM_MONITOR_RING_PFN,
    uapi.HVM_PARAM_SHARING_RING_PFN,
    uapi.HVM_PARAM_VM86_TSS_SIZED,
    uapi.HVM_PARAM_CONSOLE_PFN,
    uapi.HVM_PARAM_ACPI_IOPORTS_LOCATION,
    uapi.HVM_PARAM_VIRIDIAN,
    uapi.HVM_PARAM_IDENT_PT,
    uapi.HVM_PARAM_VM_GENERATION_ID_ADDR,
    uapi.HVM_PARAM_IOREQ_SERVER_PFN,
    uapi.HVM_PARAM_NR_IOREQ_SERVER_PAGES,
    uapi.HVM_PARAM_X87_FIP_WIDTH,
    uapi.HVM_PARAM_MCA_CAP,
)
#: What XenDomain's state is called among devices: an HVM context as Xen has it.
STATE_NAME = "xen"
#: How long a guest may take to suspend itself, as long as Xen's tools allow it.
SUSPEND_S = 60.0
_POLL_S = 0.001
_CRASH = 3


def find_domain(control: Control, store: XenStore, name_or_id: str) -> DomainInfo:
    """Return the domain that a user names, by name or number.

    Raises:
        UsageError: there is none.
    """
    if name_or_id.isdecimal():
        return control.info(int(name_or_id))
    for domid in store.directory("/local/domain"):
        if store.read(f"/local/domain/{domid}/name") == name_or_id:
            return control.info(int(domid))
    raise UsageError(f"there is no domain {name_or_id!r}", hint="pageferry xen list shows the domains")


def read_configuration(info: DomainInfo, folder: Path = USERDATA) -> bytes:
    """Return a domain's configuration as JSON, as Xen's tools keep it in dom0; empty: they keep none."""
    try:
        return (folder / f"userdata-d.{info.domid}.{info.uuid}.libxl-json").read_bytes()
    except OSError:
        return b""


def expect_trackable(info: DomainInfo, configuration: bytes) -> None:
    """Check that this is a domain whose log-dirty can be used here.

    Raises:
        UnsupportedError: it is not, and why.
    """
    if info.domid == 0:
        raise UnsupportedError("xen-domain", "domain 0 is this one", hint="name a guest: pageferry xen list")
    if not info.is_hvm:
        raise UnsupportedError(
            "xen-pv",
            f"domain {info.domid} is a PV guest, whose page tables hold machine frames",
            hint="xl save and xl migrate move it",
        )
    if info.dying:
        raise UnsupportedError("xen-domain", f"domain {info.domid} is being destroyed")
    if _config(configuration).get("pcidevs"):
        raise UnsupportedError(
            "xen-passthrough",
            f"domain {info.domid} has a passed-through device, whose writes Xen does not log",
            hint="detach it first: xl pci-detach",
        )


def expect_movable(info: DomainInfo, configuration: bytes) -> None:
    """Check that this is a domain that can be saved or moved here, while it runs.

    Raises:
        UnsupportedError: it is not, and why.
    """
    expect_trackable(info, configuration)
    found = _config(configuration)
    if not found:
        raise UnsupportedError(
            "xen-configuration",
            f"Xen's tools keep no configuration of domain {info.domid}, without which it cannot be made anew",
            hint="only a domain that xl made can be saved or moved",
        )
    kind = found.get("c_info", {}).get("type")
    if kind != "pvh":
        raise UnsupportedError(
            "xen-device-model",
            f"domain {info.domid} is of type {kind}: its device model's state is not read here",
            hint="xl save and xl migrate move it; a PVH guest has none",
        )


def expect_not_shut_down(info: DomainInfo) -> None:
    """Check that a domain has not shut down.

    Its undo log is open, which refuses a domain that was given away: such a one is suspended as well.

    Raises:
        UnsupportedError: it has.
    """
    if info.shutdown_reason is not None:
        raise UnsupportedError("xen-domain", f"domain {info.domid} has shut down")


def _config(configuration: bytes) -> dict[str, Any]:
    try:
        found = json.loads(configuration.rstrip(b"\0") or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def present_frames(control: Control, domid: int) -> DirtyBitmap:
    """Return which frames of a domain have a page.

    It is asked piece by piece, from both ends in turn, until all pages that the domain has are found: its RAM begins at
    0, and what Xen's tools put besides lies at the end, with nothing but a hole of up to 4 GiB between them.

    Raises:
        XenError: Xen refused.
    """
    pages, present = control.info(domid).memory_pages, DirtyBitmap(control.gfn_limit(domid))
    starts = range(0, present.nbits, uapi.MAX_PAGEFRAMEINFO)
    found = 0
    for turn in range(len(starts)):
        first = starts[turn // 2] if turn % 2 == 0 else starts[-1 - turn // 2]
        some = range(first, min(first + uapi.MAX_PAGEFRAMEINFO, present.nbits))
        there = np.flatnonzero(control.present(domid, some)) + first
        present.set(there)
        found += there.size
        if found >= pages:
            break
    return present


class XenDomain:
    """A domain; implements :class:`pageferry.core.vm.Vm`, as far as a source needs it.

    Its undo log is open, so that no other process works on it, until :meth:`close`. Log-dirty is off at first, and off
    after that.

    Args:
        control: Xen.
        store: its store.
        info: which domain.
        now_s: a monotonic clock in seconds.
        sleep: waits some seconds.

    Raises:
        UsageError: another process works on it.
        LogDirtyError, XenError, VmError: Xen or the kernel refused.
    """

    def __init__(
        self,
        control: Control,
        store: XenStore,
        info: DomainInfo,
        *,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.control = control
        self.store = store
        self.info = info
        self.now_s = now_s
        self._sleep = sleep
        self._lock = threading.Lock()
        self._frozen = 0
        self.suspends = False
        """Whether the next freeze suspends the domain: set when nobody else freezes it any more, for the last pause."""
        self._suspended = False
        self._asked = False  # the guest suspended itself, and is told if that was cancelled
        self._closed = False
        self._undo_log = open_undo_log(control, info)
        try:
            self.memory = self._map()
            self.log_dirty = XenLogDirty(
                control, info.domid, self.memory, hap=info.hap, note=lambda on: self._undo_log.note(log_dirty=on)
            )
            leaves, self._msrs = control.cpu_policy(info.domid)
        except BaseException:
            self._undo_log.close()
            raise
        self.cpuid: Leaves = leaves
        self.config = VmConfig(memory_bytes=self.memory.size_bytes, cpus=info.vcpus, cpu=leaves)

    def map_again(self) -> GuestMemory:
        """Return the domain's memory as it is now, by a mapping of its own; the domain stands still.

        Where it was before it is looked for first: the kernel tells which frames have no page. All others are looked
        through only if the domain has pages that were not found there.
        """
        before = DirtyBitmap(self.memory.gfn_limit)
        for region in self.memory.regions:
            before.set_range(region.first_gfn, region.pages)
        memory = map_foreign(self.control, self.info.domid, before)
        if memory.all_ram().count() >= self.control.info(self.info.domid).memory_pages:
            return memory
        memory.close()
        return self._map()

    def _map(self) -> GuestMemory:
        present = present_frames(self.control, self.info.domid)
        return map_foreign(self.control, self.info.domid, present)

    @property
    def accel(self) -> str:
        """The kind of machine."""
        return "xen"

    @property
    def status(self) -> VmStatus:
        """What the domain is doing now, but for this process's own pauses."""
        info = self.control.info(self.info.domid)
        if info.shutdown_reason is not None and not self._suspended:
            return VmStatus.CRASHED if info.shutdown_reason == _CRASH else VmStatus.SHUTDOWN
        return VmStatus.PAUSED if info.paused and not self._frozen else VmStatus.RUNNING

    @property
    def end(self) -> GuestEnd | None:
        """Set once the domain has shut down, or is gone."""
        try:
            info = self.control.info(self.info.domid)
        except UsageError:
            return GuestEnd(crash="the domain is gone")
        reason = info.shutdown_reason
        if (reason is None or self._suspended) and info.uuid == self.info.uuid and not info.dying:
            return None
        if reason is None:
            return GuestEnd(crash="the domain is being destroyed")
        if reason == _CRASH:
            return GuestEnd(crash="Xen says no more")
        return GuestEnd(exit_code=0)

    def resume(self) -> None:
        """Let a domain run that its user paused."""
        self.control.unpause(self.info.domid)

    def freeze(self) -> None:
        """Hold every vCPU until :meth:`thaw`; nests. With ``suspends`` set the domain is suspended first.

        Raises:
            VmError: it is to be suspended, and its guest does not do what it is asked; it runs on.
        """
        with self._lock:
            if self.suspends:
                self._suspend()
            self._undo_log.note(paused=self._frozen + 1)
            try:
                self.control.pause(self.info.domid)
            except XenError:
                self._undo_log.note(paused=self._frozen)
                raise
            self._frozen += 1

    def thaw(self) -> None:
        """Undo one :meth:`freeze`; the last one lets a suspended domain go on, too.

        Raises:
            VmError: it is not frozen.
        """
        with self._lock:
            if not self._frozen:
                raise VmError("the domain is not frozen")
            if self._frozen == 1 and self._suspended:
                self._cancel_suspend()
            self.control.unpause(self.info.domid)
            self._frozen -= 1
            self._undo_log.note(paused=self._frozen)

    def _suspend(self) -> None:
        domid = self.info.domid
        if self.control.hvm_param(domid, uapi.HVM_PARAM_CALLBACK_IRQ):
            self._undo_log.note(suspended=1, asked=int(SUSPEND_S))
            self._ask_to_suspend(f"/local/domain/{domid}/control/shutdown")
            self._asked = True
        else:
            self._undo_log.note(suspended=1)
            try:
                self.control.suspend(domid)
            except XenError:
                self._undo_log.note(suspended=0)
                raise
        self._suspended = True

    def _ask_to_suspend(self, path: str) -> None:
        self.store.write(path, "suspend")
        until_s = self.now_s() + SUSPEND_S
        while self.now_s() < until_s:
            if self.control.info(self.info.domid).shutdown_reason == uapi.SHUTDOWN_suspend:
                return
            self._sleep(_POLL_S)
        if self.store.read(path):  # the guest has not even taken it
            self.store.write(path, "")
        if self.control.info(self.info.domid).shutdown_reason == uapi.SHUTDOWN_suspend:
            return
        self._undo_log.note(suspended=0, asked=0)
        raise VmError(
            f"domain {self.info.domid} did not suspend itself within {SUSPEND_S:.0f} s",
            hint="its kernel must listen to control/shutdown in xenstore (Linux: CONFIG_XEN)",
        )

    def _cancel_suspend(self) -> None:
        domid = self.info.domid
        if self._asked:  # a guest suspends itself on vCPU 0; the others wait for it, and need their registers
            self.control.set_rax(domid, 0, SUSPEND_CANCELLED)
        self.control.resume(domid)
        self._suspended = self._asked = False
        self._undo_log.note(suspended=0, asked=0)

    def rename(self, suffix: str) -> str:
        """Add a suffix to the domain's name; return what it was."""
        path = f"/local/domain/{self.info.domid}/name"
        before = self.store.read(path) or ""
        self._undo_log.note(name=before)
        self.store.write(path, before + suffix)
        return before

    def give_away(self) -> None:
        """Write down that the domain may run elsewhere from now on, so that nothing is undone."""
        self._undo_log.note(given_away=1)

    def take_back(self, name: str) -> None:
        """Write down that the domain runs nowhere else, and give it its name again."""
        self.store.write(f"/local/domain/{self.info.domid}/name", name)
        self._undo_log.note(name="", given_away=0)

    def gone(self) -> None:
        """Write down that the domain runs elsewhere, or is in a file: here it stays suspended."""
        self._undo_log.note(given_away=0, suspended=0, asked=0, paused=0, name="")

    # -- what goes into a stream -------------------------------------------------------------------------------------

    def header(self) -> StreamHeader:
        """Return what a stream of this domain begins with."""
        major, minor = self.control.release
        return StreamHeader(xen_major=major, xen_minor=minor)

    def first_records(self) -> tuple[PlainRecord, ...]:
        """Return what comes before the pages."""
        return CpuidPolicy(leaves=self.cpuid), MsrPolicy(entries=self._msrs), StaticDataEnd()

    def last_records(self) -> tuple[PlainRecord, ...]:
        """Return what comes after the pages of the suspended domain, in Xen's order."""
        domid = self.info.domid
        params = ((index, self.control.hvm_param(domid, index)) for index in SAVED_PARAMS)
        return (
            self.control.tsc_info(domid),
            HvmContext(data=self.control.hvm_context(domid)),
            HvmParams(params=tuple((index, value) for index, value in params if value)),
            End(),
        )

    def save_state(self) -> MachineState:
        """Return the state as Xen has it: no vCPU of ours, one device that is Xen's HVM context."""
        return MachineState(
            vcpus=(), devices=(DeviceState(name=STATE_NAME, data=self.control.hvm_context(self.info.domid)),)
        )

    # -- what only a destination does --------------------------------------------------------------------------------

    def load_state(self, state: MachineState) -> None:
        """Refuse: Xen's tools restore a domain."""
        raise _no_destination()

    def await_memory(self, fetch: Callable[[GfnArray], None], absent: DirtyBitmap) -> AbsentPages:
        """Refuse: Xen's tools restore a domain."""
        raise _no_destination()

    def remove_pages(self, gfns: GfnArray) -> None:
        """Refuse: Xen's tools restore a domain."""
        raise _no_destination()

    def claim_backends(self) -> None:
        """Do nothing: the domain's backends are dom0's."""

    def release_backends(self) -> None:
        """Do nothing: the domain's backends are dom0's."""

    def close(self) -> None:
        """Turn log-dirty off, and give the domain back. May be called twice.

        What Xen refuses to undo is undone by the next command that works on the domain.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.log_dirty.off()
        finally:
            self.memory.close()
            self._undo_log.close()


def _no_destination() -> UnsupportedError:
    return UnsupportedError(
        "xen-destination", "a domain is made by Xen's own tools", hint="xl restore, xl migrate-receive"
    )
