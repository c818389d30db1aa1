"""StandardMachine: run control, standard devices, and state saved and loaded in one order, for every kind of machine.

Each kind (``kvm``, ``soft``) makes its vCPUs and its tracker, and fills in the abstract methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.cpuid import Leaves
from pageferry.core.errors import RefusedError, UnsupportedError, VmError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.run import RunControl, Vcpu
from pageferry.core.state import MachineState, VcpuState
from pageferry.core.vm import AbsentPages, GuestEnd, LogDirty, MachineModel, VmConfig, VmStatus
from pageferry.devices.platform import Platform
from pageferry.devices.virtio.devices import VirtioDevices

_NOTICED_NS = 10**9
_NS_PER_MS = 10**6
#: How long a guest that is to stand still waits for a device; as long as many a disk's own time-out.
_DEVICE_PATIENCE_S = 30.0


class StandardMachine(ABC):
    """Base of the machines; implements :class:`pageferry.core.machine.Machine`.

    A subclass calls ``__init__`` with its memory and then, before anything runs, :meth:`_attach`.

    Args:
        config: what was asked for.
        memory: the guest's RAM.
        cpuid: the guest's CPUID table.

    Raises:
        UsageError: something that a virtio device needs is not there.
        UnsupportedError: there is no such device here, or the machine model has none.
    """

    def __init__(self, config: VmConfig, memory: GuestMemory, cpuid: Leaves) -> None:
        self.memory = memory
        self.cpuid = cpuid
        self.platform = Platform(memory, config.machine)
        if config.devices and config.machine is not MachineModel.PC:
            raise UnsupportedError("devices", f"a machine that is {config.machine} has no virtio devices")
        self.virtio = VirtioDevices(config.devices, memory, self.platform.bus, lambda: self.run_control.held)
        self.config = replace(config, devices=self.virtio.specs)
        if config.machine is MachineModel.PC:
            self.virtio.plug_in()
        self._closed = False

    def _attach(self, vcpus: Sequence[Vcpu], log_dirty: LogDirty) -> None:
        self.run_control = RunControl(vcpus, name=self.accel, on_stood=self._let_time_stand)
        self.replace_tracker(log_dirty)

    def replace_tracker(self, log_dirty: LogDirty) -> None:
        """Let another tracker answer for this machine, which may be made of its own; log-dirty is off, nothing runs."""
        self._log_dirty = log_dirty
        self.memory.on_write(log_dirty.mark)

    @property
    @abstractmethod
    def accel(self) -> str:
        """``kvm`` or ``soft``."""

    @abstractmethod
    def _save_vcpus(self) -> tuple[VcpuState, ...]:
        """Return the vCPUs' states; none is inside the guest."""

    @abstractmethod
    def _load_vcpus(self, vcpus: tuple[VcpuState, ...], tsc_khz: int | None) -> None:
        """Replace the vCPUs' states and the rate of their TSCs; none is inside the guest; the number fits."""

    @abstractmethod
    def _tsc_khz(self) -> int | None:
        """Return ``MachineState.tsc_khz``."""

    @abstractmethod
    def _set_tsc_back(self, ticks: int) -> None:
        """Let all vCPUs' TSCs have counted so many ticks less; no vCPU is inside the guest."""

    @abstractmethod
    def _save_kvm_clock(self) -> int | None:
        """Return ``MachineState.kvm_clock_ns``; no vCPU is inside the guest."""

    @abstractmethod
    def _load_kvm_clock(self, clock_ns: int) -> None:
        """Go on from a saved one; no vCPU is inside the guest, and all else is loaded."""

    @abstractmethod
    def _free(self) -> None:
        """Free what the machine holds; no vCPU will run again. Called once."""

    @abstractmethod
    def await_memory(self, fetch: Callable[[GfnArray], None], absent: DirtyBitmap) -> AbsentPages:
        """Let frames be absent until ``fetch`` has brought them."""

    @property
    def log_dirty(self) -> LogDirty:
        """The tracker of this machine."""
        return self._log_dirty

    @property
    def status(self) -> VmStatus:
        """What the guest is doing now."""
        return self.run_control.status

    @property
    def end(self) -> GuestEnd | None:
        """Set once the guest has ended."""
        return self.run_control.end

    @property
    def vcpu_threads(self) -> tuple[int | None, ...]:
        """The kernel's ids of the vCPUs' threads."""
        return self.run_control.thread_ids

    def resume(self) -> None:
        """Let the guest run, with what stands behind its devices."""
        self.claim_backends()
        self.run_control.resume()
        self.virtio.wake()

    def pause(self) -> None:
        """Stop every vCPU at an instruction boundary."""
        self.run_control.pause()
        self._let_devices_finish()

    def freeze(self) -> None:
        """Hold every vCPU at an instruction boundary until thawed."""
        self.run_control.freeze()
        try:
            self._let_devices_finish()
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> None:
        """Undo one freeze."""
        self.run_control.thaw()
        self.virtio.wake()

    def _let_time_stand(self, ns: int) -> None:
        """Let a PC not have the time for which it stood; a kernel that finds half a minute gone believes in a lockup.

        Short stops pass as those of a busy host.
        """
        if ns < _NOTICED_NS or self.config.machine is not MachineModel.PC or (khz := self._tsc_khz()) is None:
            return
        self.platform.clock.set_back(ns)
        self._set_tsc_back(ns * khz // _NS_PER_MS)

    def _let_devices_finish(self) -> None:
        """Return when no device that began before the guest was held touches memory any more.

        Raises:
            VmError: one has not ended what it does in :data:`_DEVICE_PATIENCE_S`.
        """
        with self.platform.bus.locked():
            pass
        self.virtio.finish(_DEVICE_PATIENCE_S)

    def claim_backends(self) -> None:
        """Take what stands behind the guest's devices."""
        self.virtio.claim()

    def release_backends(self) -> None:
        """Give it back."""
        self.virtio.release()

    def wait(self, timeout_s: float | None = None) -> VmStatus:
        """Wait until the guest is not running; return the status."""
        return self.run_control.wait(timeout_s)

    def attach_sync(self, attached: bool) -> None:
        """Decide whether sync points pause the guest (True) or are passed over (False, as at first)."""
        (self.platform.sync.attached.set if attached else self.platform.sync.attached.clear)()

    def sync_value(self) -> int | None:
        """Return the value of the sync point where the guest is paused now."""
        return self.run_control.sync_value

    def reply_sync(self, value: int) -> None:
        """Answer that sync point."""
        self.platform.sync.reply(value)

    def on_console(self, sink: Callable[[bytes], None] | None) -> None:
        """Set who sees the guest's console output as it comes."""
        self.platform.console.sink = sink
        self.virtio.on_console(sink)

    def type_console(self, data: bytes) -> int:
        """Give the console input; return how many of its bytes were taken."""
        with self.platform.bus.locked():  # the state is saved under it, after a freeze: nothing is taken too late
            if self.run_control.frozen:
                return 0
            taken = self.virtio.type(data)
            return self.platform.console.type(data) if taken is None else taken

    def press_power_button(self) -> None:
        """Ask the guest's operating system to shut down, as the button of a PC does."""
        with self.platform.bus.locked():  # as for the console
            if self.run_control.frozen:
                raise RefusedError("the guest stands still for its migration", hint="ask again when that has ended")
            if self.platform.power is None or not self.platform.power.press_power_button():
                raise RefusedError(
                    "the guest does not listen to a power button",
                    hint="a Linux does once its modules button and evdev are loaded; quit ends the guest at once",
                )

    def save_state(self) -> MachineState:
        """Return everything but memory."""
        self._expect_paused("saved")
        with self.run_control.stopped():
            self._let_devices_finish()
            self.run_control.count_standing()
            # Devices first: an interrupt that goes from one to a vCPU meanwhile is then in both states, not in neither.
            devices = self.platform.bus.save()
            return MachineState(
                vcpus=self._save_vcpus(),
                devices=devices,
                tsc_khz=self._tsc_khz(),
                kvm_clock_ns=self._save_kvm_clock(),
            )

    def load_state(self, state: MachineState) -> None:
        """Replace everything but memory."""
        self._expect_paused("restored")
        if len(state.vcpus) != self.config.cpus:
            raise VmError(f"the state has {len(state.vcpus)} vCPUs, this machine has {self.config.cpus}")
        with self.run_control.stopped():
            try:
                self._load_vcpus(state.vcpus, state.tsc_khz)
                self.platform.bus.load(state.devices)
                if state.kvm_clock_ns is not None:
                    self._load_kvm_clock(state.kvm_clock_ns)
            finally:  # a state that is refused half-way may have set the guest's time
                self.run_control.stand_from_now()

    def remove_pages(self, gfns: GfnArray) -> None:
        """Take frames away from the guest; a machine that can says so by its own method."""
        raise UnsupportedError(
            "ballooning",
            f"a guest that gave {gfns.size} pages back cannot live on {self.accel}",
            hint="receive it with --accel soft",
        )

    def close(self) -> None:
        """Stop the guest and free the machine."""
        if not self._closed:
            self._closed = True
            self.run_control.close()
            self.virtio.close()
            self._free()
            self.memory.close()

    def _expect_paused(self, what: str) -> None:
        if not self.run_control.held:
            raise VmError(f"the state cannot be {what} while the guest runs", hint="pause it first")
