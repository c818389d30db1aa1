"""KvmVcpu: one vCPU on the real CPU: the loop around ``KVM_RUN``, and how it is stopped.

**Instruction boundaries.** A port or MMIO exit leaves the instruction half done inside the kernel: it is completed at
the *next* ``KVM_RUN``, which first stores what an input read and only then looks at ``immediate_exit`` or a signal. So
``run()`` returns in one way only, on EINTR, which the kernel gives at an instruction boundary. A device's effect waits
until then::

    guest          OUT exit port --.
    kernel          exit IO        |                          finishes OUT, rip moves on -- EINTR
    run()                          `- bus: GuestExit(3); immediate_exit = 1; KVM_RUN ----------'  return GuestExit(3)

Finishing may need more than one call: REP and page-crossing accesses exit again for their next part, with
``immediate_exit`` set all the while.

**Kicks.** ``kick()`` stores ``immediate_exit`` and *then* signals; the kernel blocks nothing in between unseen::

    kick falls                                       seen by
    before run() has noted its thread                nothing: lost; RunControl repeats it
    while run() is in Python                         immediate_exit, at the next KVM_RUN
    after the kernel looked at immediate_exit        the pending signal, which is checked after it, before entry
    inside the guest                                 the signal's interrupt forces an exit

Source: kernel ``api.rst``, section 5 (The kvm_run structure), ``immediate_exit``, KVM_EXIT_IO, KVM_EXIT_MMIO.
"""

import errno
import signal
import threading
from collections.abc import Callable
from struct import Struct

from pageferry.core import confined
from pageferry.core.errors import GuestCrash, KvmError, VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.core.run import Effect, GuestExit, GuestReset, InvalidateTlb, SyncPoint
from pageferry.core.state import VcpuState
from pageferry.devices.bus import DeviceBus
from pageferry.kvm import uapi, vcpu_state
from pageferry.kvm.device_timer import DeviceTimer
from pageferry.kvm.fds import VcpuFd
from pageferry.kvm.kick import kick_signal

ExitHandler = Callable[[], Effect | None]

_CR0_PG = 1 << 31
_BUS_SIZES = (1, 2, 4, 8)
#: What an access tells in ``kvm_run``, as plain bytes: to read a structure's fields one by one takes far longer.
_EXIT_AT = uapi.KvmRun.exit.offset
_IO = Struct("<BBHIQ")
_MMIO = Struct("<Q8sIB")
_MMIO_DATA_AT = _EXIT_AT + uapi.KvmRunMmio.data.offset
_SUBERRORS = {
    uapi.KVM_INTERNAL_ERROR_EMULATION: "an instruction that KVM cannot emulate",
    uapi.KVM_INTERNAL_ERROR_SIMUL_EX: "simultaneous exceptions",
    uapi.KVM_INTERNAL_ERROR_DELIVERY_EV: "a fault while delivering an event",
    uapi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "an unexpected exit",
}


def _stronger(first: Effect | None, second: Effect | None) -> Effect | None:
    """Of two effects of one instruction return the one to act on: an end before a meeting before a wait."""
    if first is None or second is None:
        return second or first
    for kind in (GuestExit, GuestReset, SyncPoint):
        for effect in (first, second):
            if isinstance(effect, kind):
                return effect
    return first


class KvmVcpu:
    """One vCPU; implements :class:`pageferry.core.run.Vcpu`.

    ``exit_handlers`` maps an exit reason to what to do about it on the vCPU's thread; a tracker that has exits of its
    own adds to it before the guest runs.

    Args:
        fd: taken over.
        bus: where port and MMIO accesses go.
        timer: drives the devices there that act by themselves.
        parts: what it has besides the registers that every vCPU has.
        memory: the guest's.
        index: which vCPU this is.
    """

    def __init__(
        self,
        fd: VcpuFd,
        bus: DeviceBus,
        timer: DeviceTimer,
        parts: vcpu_state.Parts,
        *,
        memory: GuestMemory,
        index: int = 0,
    ) -> None:
        self.fd = fd
        self.index = index
        self._memory = memory
        self._bus = bus
        self._timer = timer
        self._kick_signal = kick_signal()
        self._kick_lock = threading.Lock()
        self._thread_ident: int | None = None
        self._parts = parts
        self._sealed: vcpu_state.Sealed | None = None
        self.exit_handlers: dict[int, ExitHandler] = {
            uapi.KVM_EXIT_IO: self._on_io,
            uapi.KVM_EXIT_MMIO: self._on_mmio,
            uapi.KVM_EXIT_INTR: lambda: None,
            uapi.KVM_EXIT_IRQ_WINDOW_OPEN: lambda: None,
            uapi.KVM_EXIT_HLT: self._on_halt,
            uapi.KVM_EXIT_SHUTDOWN: self._on_shutdown,
            uapi.KVM_EXIT_INTERNAL_ERROR: self._on_internal_error,
            uapi.KVM_EXIT_FAIL_ENTRY: self._on_fail_entry,
        }

    def run(self) -> Effect | None:
        """Run the guest until it is kicked or a device has an effect; on the vCPU's own thread.

        On return the vCPU is at an instruction boundary with no I/O under way.

        Raises:
            GuestCrash: the guest did something that no machine survives.
            VmError: the machine failed.
        """
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self._kick_signal})  # a thread inherits its maker's mask
        with self._kick_lock:
            self._thread_ident = threading.get_ident()
        self._timer.notice()
        try:
            return self._run()
        finally:
            with self._kick_lock:
                self._thread_ident = None
                self.fd.run.immediate_exit = 0

    def _run(self) -> Effect | None:
        fd, run, handlers = self.fd, self.fd.run, self.exit_handlers
        pending: Effect | None = None
        while True:
            code = fd.try_run()
            if code == errno.EINTR:
                if isinstance(pending, InvalidateTlb):
                    vcpu_state.forget_translations(fd, self._sealed, self._parts)
                    return None  # and RunControl enters again
                return pending
            if code == errno.EAGAIN:
                continue
            if code:
                raise KvmError("KVM_RUN", code)
            handler = handlers.get(run.exit_reason)
            if handler is None:
                raise VmError(f"vcpu {self.index}: KVM exit reason {run.exit_reason} is not known here")
            effect = handler()
            if effect is not None:
                pending = _stronger(pending, effect)
                run.immediate_exit = 1  # finish the instruction, go no further

    def kick(self) -> None:
        """Make ``run()`` return soon; from any thread, any number of times. Lost if ``run()`` is not under way."""
        with self._kick_lock:  # held so that the thread cannot end between the look and the signal
            if self._thread_ident is not None:
                self.fd.run.immediate_exit = 1
                signal.pthread_kill(self._thread_ident, self._kick_signal)

    def save(self, host_tsc_now: int | None = None) -> VcpuState:
        """Return the registers; ``run()`` is not under way. See :func:`pageferry.kvm.vcpu_state.save`."""
        return vcpu_state.save(self.fd, self._sealed, self._parts, host_tsc_now)

    def load(self, state: VcpuState, host_tsc_now: int | None = None) -> None:
        """Replace the registers; ``run()`` is not under way. See :func:`pageferry.kvm.vcpu_state.load`."""
        self._sealed = vcpu_state.load(self.fd, state, self._parts, host_tsc_now)

    def _on_io(self) -> Effect | None:
        area = self.fd.area
        direction, size, port, count, at = _IO.unpack_from(area, _EXIT_AT)
        effect: Effect | None = None
        for start in range(at, at + count * size, size):  # one element, or several of a string instruction
            if direction == uapi.KVM_EXIT_IO_OUT:
                value = int.from_bytes(area[start : start + size], "little")
                effect = _stronger(effect, self._bus.port_write(port, size, value))
                self._timer.notice()
            else:
                area[start : start + size] = self._bus.port_read(port, size).to_bytes(size, "little")
        return effect

    def _on_mmio(self) -> Effect | None:
        area = self.fd.area
        gpa, data, length, is_write = _MMIO.unpack_from(area, _EXIT_AT)
        # An access that crosses a page arrives in parts of any length; the bus takes powers of two.
        size = length if length in _BUS_SIZES else 1
        effect: Effect | None = None
        for at in range(0, length, size):
            if is_write:
                value = int.from_bytes(data[at : at + size], "little")
                effect = _stronger(effect, self._bus.mmio_write(gpa + at, size, value))
            else:
                start = _MMIO_DATA_AT + at
                area[start : start + size] = self._bus.mmio_read(gpa + at, size).to_bytes(size, "little")
        return effect

    def _on_halt(self) -> Effect | None:
        raise GuestCrash(f"vcpu {self.index} halted, and no interrupt can wake it: {self._where()}")

    def _on_shutdown(self) -> Effect | None:
        forbidden = self._forbidden() if self._sealed else None
        raise forbidden or GuestCrash(f"vcpu {self.index} shut down (triple fault): {self._where()}")

    def _on_internal_error(self) -> Effect | None:
        internal = self.fd.run.internal
        what = _SUBERRORS.get(internal.suberror, f"suberror {internal.suberror}")
        raise GuestCrash(f"vcpu {self.index} stopped KVM with an internal error ({what}): {self._where()}")

    def _on_fail_entry(self) -> Effect | None:
        entry = self.fd.run.fail_entry
        raise VmError(
            f"vcpu {self.index} cannot enter the guest: hardware reason {entry.hardware_entry_failure_reason:#x}"
        )

    def _forbidden(self) -> GuestCrash | None:
        """Return the end of a guest by an instruction that its ABI forbids, if that is what it did."""
        regs = uapi.KvmRegs()
        self.fd.ioctl(uapi.KVM_GET_REGS, regs)
        return confined.crash(self._code(regs.rip), rip=regs.rip, rsp=regs.rsp, rcx=regs.rcx)

    def _code(self, rip: int) -> bytes:
        """Return the bytes of the instruction at ``rip``, as far as they are mapped, RAM, and on one page."""
        place = uapi.KvmTranslation(linear_address=rip)
        self.fd.ioctl(uapi.KVM_TRANSLATE, place)
        gpa = place.physical_address
        if not place.valid or not self._memory.is_ram(gpa, 1):
            return b""
        return self._memory.read(gpa, min(confined.MAX_INSTRUCTION_BYTES, PAGE_SIZE - gpa % PAGE_SIZE))

    def _where(self) -> str:
        regs, sregs = uapi.KvmRegs(), uapi.KvmSregs()
        self.fd.ioctl(uapi.KVM_GET_REGS, regs)
        self.fd.ioctl(uapi.KVM_GET_SREGS, sregs)
        if not sregs.cr0 & _CR0_PG:  # AMD: KVM resets a vCPU that shut down, what it was doing is gone
            return "its registers are lost"
        return f"rip={regs.rip:#x} rsp={regs.rsp:#x} cr2={sregs.cr2:#x}"
