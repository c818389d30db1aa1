"""TrackedGuest: what an attempt does to the guest at its source, and how it is undone (law 5)."""

import logging
from dataclasses import replace

from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import VmError
from pageferry.core.events import DeviceCost
from pageferry.core.frames import GfnArray
from pageferry.core.vm import Vm
from pageferry.stream.hvm_context import encode_machine_state
from pageferry.stream.records import CpuidPolicy, End, HvmContext, HvmParams, PlainRecord, StaticDataEnd, TscInfo

_log = logging.getLogger(__name__)


class TrackedGuest:
    """One guest under log-dirty, frozen at the end.

    Args:
        vm: the guest; running or paused.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.frozen = False
        """Whether the guest stands still for the attempt's sake."""
        self.fault_count: int | None = None
        """Write faults that tracking cost the guest; None as long as it is on, or if the tracker cannot know."""
        self.state_bytes: int | None = None
        """How much state besides memory goes with the guest, in the stream; None as long as it was not saved."""
        self.devices: tuple[DeviceCost, ...] = ()
        """Each device's part of it."""
        self.stuck: VmError | None = None
        """Why the guest stands still here although it should run: another process has one of its disks or networks."""
        self._tracked = False

    def first_records(self) -> tuple[PlainRecord, ...]:
        """Return what comes first in a stream of this guest."""
        return (CpuidPolicy(leaves=self.vm.cpuid), StaticDataEnd())

    def last_records(self, *, paused: bool = False) -> tuple[TscInfo, HvmParams, HvmContext, End]:
        """Save the state of the frozen guest; return what comes last in its stream.

        Args:
            paused: whether to say there that its user had paused it.
        """
        state = replace(self.vm.save_state(), paused=paused)
        context = encode_machine_state(state)
        self.state_bytes = len(context)
        self.devices = tuple(
            DeviceCost(name=device.name, size_bytes=len(device.data), save_ns=device.save_ns)
            for device in state.devices
        )
        return TscInfo(), HvmParams(), HvmContext(data=context), End()

    def rehearse_state(self) -> None:
        """Do as :meth:`last_records` does, of a guest that stands still for that long, and forget the result.

        A domain of Xen has no vCPUs of ours: its state is an HVM context of Xen's, which goes as it is.
        """
        self.vm.freeze()
        try:
            state = self.vm.save_state()
            if state.vcpus:
                encode_machine_state(state)
        finally:
            self.vm.thaw()

    def enable(self) -> None:
        """Turn log-dirty on."""
        self.vm.log_dirty.enable()
        self._tracked = True

    def populated(self) -> GfnArray:
        """Return what has storage (uint64[n], ascending), to be sent first.

        Law 3: this comes after :meth:`enable`. A page touched later is dirty by then.
        """
        return expand_runs(*self.vm.memory.populated())

    def freeze(self) -> None:
        """Have the guest stand still until :meth:`thaw`."""
        self.vm.freeze()
        self.frozen = True

    def thaw(self) -> None:
        """Let the guest run on, if it stands still for our sake."""
        if self.frozen:
            self.vm.thaw()
            self.frozen = False

    def release_backends(self) -> None:
        """Give back the disks and networks of the frozen guest, so that another process can take them.

        Raises:
            VmError: what was written could not be put on a disk.
        """
        self.vm.release_backends()

    def claim_backends(self) -> None:
        """Take them again, if they were given back.

        Raises:
            VmError: another process has one.
        """
        self.vm.claim_backends()

    def release(self) -> None:
        """Turn log-dirty off, as far as the tracker can: its failure may be why the attempt ends."""
        if not self._tracked:
            return
        try:
            self.fault_count = self.vm.log_dirty.stats().fault_count
        except Exception:
            _log.warning("the tracker's counters are lost", exc_info=True)
        try:
            self.vm.log_dirty.off()
            self._tracked = False
        except Exception:
            _log.exception("log-dirty could not be turned off")

    def restore(self) -> None:
        """Leave the guest as it was: log-dirty off, running unless its user paused it.

        Whatever fails, it runs on, unless another process has taken its disk meanwhile: then it is ``stuck``, and
        this may be called again.
        """
        try:
            self.release()
        finally:
            self._go_on()

    def _go_on(self) -> None:
        self.stuck = None
        try:
            self.claim_backends()
        except VmError as error:
            _log.error("the guest stands still here: %s", error)
            self.stuck = error
        else:
            self.thaw()

    def end(self) -> str | None:
        """Tell how the guest ended, in words; None while it has not."""
        end = self.vm.end
        if end is None:
            return None
        return f"it crashed: {end.crash}" if end.crash is not None else f"exit code {end.exit_code}"
