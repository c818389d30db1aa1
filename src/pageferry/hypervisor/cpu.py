"""A vCPU: Unicorn executes the instructions, our MMU answers its TLB.

Unicorn's physical addresses are machine addresses. On a TLB miss, or the first write to a page filled read-only, it
calls :meth:`SoftVcpu._tlb_fill`: the two-dimensional walk of nested paging, gva -> gfn through the guest's tables, then
gfn -> mfn through the P2M, with a nested page fault where the P2M denies. The answer stays in Unicorn's TLB until the
vCPU flushes it, which it does on its own thread before it enters the guest again (law 2).

Law 1 at this level: a page is filled writable only if its P2M type is ``ram_rw`` *now* (and the guest's own dirty bit
is set).

A vCPU always stops at an exact instruction boundary: at the very instruction for a trap (:mod:`.traps`), and between
slices of a fixed number of instructions when it is kicked. (``uc_emu_stop`` from another thread is not exact: between
chained blocks it leaves RIP behind, and what was executed is executed again.) The guest runs in ring 3 (the guest ABI),
has no handlers, and so any exception is its end: a GuestCrash, as the triple fault would be on hardware.
"""

import time
from dataclasses import replace

from unicorn import unicorn_const as const
from unicorn import x86_const as x86

from pageferry.core.cpuid import Leaves, answer
from pageferry.core.errors import GuestCrash, VmError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE
from pageferry.core.run import Effect, InvalidateTlb
from pageferry.core.state import VcpuState
from pageferry.devices.bus import DeviceBus
from pageferry.hypervisor import unicorn_api as api
from pageferry.hypervisor.guest_walk import GuestPageFault, GuestWalker
from pageferry.hypervisor.machine import MachineMemory
from pageferry.hypervisor.mmio import MMIO_WINDOW, MmioWindow
from pageferry.hypervisor.npf import Resolution, nested_page_fault
from pageferry.hypervisor.p2m import P2M
from pageferry.hypervisor.p2m_types import READABLE, WRITABLE
from pageferry.hypervisor.paging import Paging, Tlb
from pageferry.hypervisor.registers import (
    CR0_WP,
    CR4_SMAP,
    CR4_SMEP,
    EFER_NXE,
    PRIVATE_MADDR,
    check_supported,
    enter_ring_3,
    load_registers,
    reset_state,
    save_registers,
)
from pageferry.hypervisor.shadow import ShadowPaging
from pageferry.hypervisor.shadow_mmu import ShadowMmu
from pageferry.hypervisor.traps import (
    VECTOR_DEBUG,
    VECTOR_DOUBLE_FAULT,
    VECTOR_GENERAL_PROTECTION,
    decode_rdtsc,
    exception_name,
    is_trapped,
)

_READ_WRITE = api.READ | api.WRITE
_CPUID_REGISTERS = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX)
_STALE_STARTS = 8
#: Well under a millisecond: how long a kick may take.
_SLICE_INSTRUCTIONS = 20_000
#: A start that executes no instruction takes a few microseconds, a slice several hundred.
_NOTHING_NS = 50_000


class SoftVcpu:
    """One vCPU; implements :class:`pageferry.core.run.Vcpu`. Its state is undefined until :meth:`load`.

    Args:
        machine: machine memory.
        p2m: the domain's P2M.
        bus: the devices.
        shadow: the domain's shadow paging; used after :meth:`use_shadow`.
        paging: the domain's log-dirty.
        tlb: its own, as the others know it.
        cpuid: what its CPUID instruction answers from.
    """

    def __init__(
        self,
        machine: MachineMemory,
        p2m: P2M,
        bus: DeviceBus,
        shadow: ShadowPaging,
        *,
        paging: Paging,
        tlb: Tlb,
        cpuid: Leaves,
    ) -> None:
        self._machine = machine
        self._p2m = p2m
        self._bus = bus
        self._cpuid = cpuid
        self._walker = GuestWalker(machine.words, self._walker_access)
        self.shadow_mmu = ShadowMmu(shadow, p2m, self._walker, paging, self._on_failure)
        self._paging = paging
        self.tlb = tlb
        self._translate = self._nested_walk
        self._mmio = MmioWindow(bus, self._on_failure)
        self._engine: api.Engine | None = None
        self._loaded = reset_state()
        self._rip = 0
        self._entering = False
        self._kicked = False
        self._effect: Effect | None = None
        self._failure: BaseException | None = None
        self._vector: int | None = None
        self._io_trapped = False
        self._renewed = False
        self._tlb_entries: dict[int, api.TlbEntry] = {}
        self._code_pages: dict[int, bytes] = {}  # maddr of a page the emulator may have translated -> what it held
        self._tsc_zero = 0

    # --- what RunControl calls ---

    def run(self) -> Effect | None:
        """Run the guest until kicked or a device has an effect; see the protocol."""
        if self._engine is None:
            raise VmError("this vCPU has no state yet", hint="load a state first")
        self._kicked = False
        self._before_entry(self._engine)
        idle_starts = 0
        while not self._kicked:
            engine, before, began_ns = self._engine, self._rip, time.perf_counter_ns()
            error = engine.start(before, _SLICE_INSTRUCTIONS)
            self._rip = engine.get(x86.UC_X86_REG_RIP)
            if self._rip != before or time.perf_counter_ns() - began_ns > _NOTHING_NS:  # it may loop to where it was
                idle_starts = 0
            if self._failure is not None:
                self._crash()
            if self.tlb.flush_wanted:
                self._flush_tlb(engine)
            trapped = self._take_io_trap()
            if self._effect is not None:
                effect, self._effect = self._effect, None
                if isinstance(effect, InvalidateTlb):
                    self._invalidate(engine)
                    continue
                return effect
            if trapped:
                continue
            if self._vector is not None or error:
                self._exception(engine, error)
            elif self._emulate_rdtsc(engine):
                idle_starts = 0
            else:
                idle_starts = self._stopped_for_nothing(idle_starts + 1)
        return None

    def kick(self) -> None:
        """Make ``run`` return after the slice that it is in; any thread."""
        self._kicked = True

    # --- state; the vCPU is outside the guest ---

    def load(self, state: VcpuState) -> None:
        """Replace the state: a fresh emulator, so nothing of the old one can remain.

        Raises:
            UnsupportedError: not a state this machine can run; the vCPU keeps the old one.
        """
        check_supported(state)
        self._engine = None
        engine = api.Engine(self._machine.mapping.hva, self._machine.size_bytes)
        engine.hook(const.UC_HOOK_TLB_FILL, api.TLB_FILL(self._tlb_fill))
        self._entering = True
        try:
            enter_ring_3(engine, state)
        finally:
            self._entering = False
        engine.hook(const.UC_HOOK_INTR, api.INTERRUPT(self._on_exception))
        engine.hook(const.UC_HOOK_INSN, api.PORT_IN(self._on_in), 1, 0, x86.UC_X86_INS_IN)
        engine.hook(const.UC_HOOK_INSN, api.PORT_OUT(self._on_out), 1, 0, x86.UC_X86_INS_OUT)
        engine.hook(const.UC_HOOK_INSN, api.CPUID(self._on_cpuid), 1, 0, x86.UC_X86_INS_CPUID)
        for instruction in (x86.UC_X86_INS_SYSCALL, x86.UC_X86_INS_SYSENTER):
            engine.hook(const.UC_HOOK_INSN, api.SYSTEM_CALL(self._on_system_call), 1, 0, instruction)
        self._mmio.attach(engine)
        self.shadow_mmu.attach(engine)
        load_registers(engine, state)
        self._walker.cr3 = state.cr3
        self._walker.write_protect = bool(state.cr0 & CR0_WP)
        self._walker.no_execute = bool(state.efer & EFER_NXE)
        self._walker.smep = bool(state.cr4 & CR4_SMEP)
        self._walker.smap = bool(state.cr4 & CR4_SMAP)
        self._code_pages.clear()
        self._rip = state.rip
        self._tsc_zero = time.monotonic_ns() - state.tsc
        self._effect = self._failure = self._vector = None
        self._io_trapped = self._renewed = False
        self._loaded = state
        self.tlb.request_flush()
        self._engine = engine

    def save(self) -> VcpuState:
        """Return the state; before any was loaded, that after reset."""
        if self._engine is None:
            return self._loaded
        return save_registers(self._engine, self._loaded, rip=self._rip, tsc=self._tsc())

    def use_shadow(self, shadowed: bool) -> None:
        """Translate through the shadow tables (True), or by the nested walk; the vCPU is outside the guest."""
        mmu, walker = self.shadow_mmu, self._walker
        self._translate = mmu.translate if shadowed else self._nested_walk
        walker.nested_access = mmu.table_read if shadowed else self._walker_access
        walker.nested_update = mmu.table_write if shadowed else None
        self.tlb.request_flush()

    def close(self) -> None:
        """Free the emulator; the vCPU will not run again."""
        self._engine = None

    # --- entering ---

    def _before_entry(self, engine: api.Engine) -> None:
        if self.tlb.flush_wanted:
            self._flush_tlb(engine)
        view = self._machine.mapping.view
        for maddr, code in self._code_pages.items():
            if view[maddr : maddr + PAGE_SIZE] != code:  # written behind our back: DMA, a debugger
                self._code_pages.clear()
                engine.flush_code()
                self._flush_tlb(engine)
                return

    def _flush_tlb(self, engine: api.Engine) -> None:
        self.tlb.flush_wanted = False
        engine.flush_tlb()
        self._walker.flush()
        self.tlb.flushes += 1

    def _invalidate(self, engine: api.Engine) -> None:
        """The guest has changed its page tables and says so."""
        self._flush_tlb(engine)
        self.shadow_mmu.shadow.resync()

    def _tsc(self) -> int:
        return (time.monotonic_ns() - self._tsc_zero) & 0xFFFF_FFFF_FFFF_FFFF  # one tick per nanosecond

    # --- the MMU: callbacks from inside the guest; none may raise ---

    def _tlb_fill(self, _engine: int, gva: int, access: int, entry_at: int, _data: int) -> int:
        try:
            entry = self._tlb_entries.get(entry_at)
            if entry is None:
                # SAFETY: the engine's own stack, valid during this call; the same few addresses come again.
                entry = self._tlb_entries[entry_at] = api.TlbEntry.from_address(entry_at)
            if self._entering:
                entry.paddr, entry.perms = PRIVATE_MADDR, _READ_WRITE | api.EXECUTE
            else:
                maddr, entry.perms = self._translate(gva, access == api.ACCESS_WRITE, access == api.ACCESS_FETCH)
                entry.paddr = maddr
                if access == api.ACCESS_FETCH:
                    self._code_pages[maddr] = bytes(self._machine.mapping.view[maddr : maddr + PAGE_SIZE])
        except BaseException as error:
            self._on_failure(error)
            return 0
        return 1

    def _nested_walk(self, gva: int, write: bool, fetch: bool) -> tuple[int, int]:
        """Return ``(maddr, permissions)`` for an access, once it is allowed."""
        gfn, writable, executable = self._walker.translate(gva, write=write, fetch=fetch)
        mfn, p2m_type = self._p2m.lookup(gfn)
        writes = p2m_type in WRITABLE
        if not (writes if write else p2m_type in READABLE):
            resolution = nested_page_fault(self._paging, gfn, p2m_type, write=write)
            if resolution is Resolution.DISCARD:  # no device has this gpa, so the bus ignores it; reads fill again
                return MMIO_WINDOW + (gfn << PAGE_SHIFT), api.WRITE
            if resolution is Resolution.EMULATE:
                if fetch:
                    raise GuestCrash(f"instruction fetch from device space, gpa {gfn << PAGE_SHIFT:#x}")
                return MMIO_WINDOW + (gfn << PAGE_SHIFT), _READ_WRITE if writable else api.READ
            writes = True
        permissions = api.READ
        if writable and writes:
            permissions |= api.WRITE
        if executable:
            permissions |= api.EXECUTE
        return mfn << PAGE_SHIFT, permissions

    def _walker_access(self, gfn: int) -> int:
        """Return the mfn of a guest page table, writable: AMD-V's walker writes (see guest_walk)."""
        mfn, p2m_type = self._p2m.lookup(gfn)
        if p2m_type in WRITABLE or nested_page_fault(self._paging, gfn, p2m_type, write=True) is Resolution.RETRY:
            return mfn
        raise GuestCrash(f"page table in device space or read-only RAM, gpa {gfn << PAGE_SHIFT:#x}")

    # --- instructions that need the hypervisor ---

    def _emulate_rdtsc(self, engine: api.Engine) -> bool:
        """Perform the instruction at RIP if it is RDTSC or RDTSCP; tell whether it was."""
        code = self._fetch(self._rip, 3)
        instruction = decode_rdtsc(code)
        if instruction is None:
            return False
        tsc = self._tsc()
        engine.set(x86.UC_X86_REG_RAX, tsc & 0xFFFF_FFFF)
        engine.set(x86.UC_X86_REG_RDX, tsc >> 32)
        if instruction.aux:
            engine.set(x86.UC_X86_REG_RCX, self._loaded.tsc_aux)
        self._rip += instruction.length
        return True

    def _fetch(self, gva: int, size: int) -> bytes:
        """Return the bytes of code at ``gva``, fewer where it cannot be read."""
        code = b""
        while size:
            piece = min(size, PAGE_SIZE - (gva & PAGE_SIZE - 1))
            try:
                gfn, _, _ = self._walker.translate(gva, write=False, fetch=True)
            except (GuestPageFault, GuestCrash):
                break
            mfn, p2m_type = self._p2m.lookup(gfn)
            if p2m_type not in READABLE:
                break
            at = (mfn << PAGE_SHIFT) + (gva & PAGE_SIZE - 1)
            code += bytes(self._machine.mapping.view[at : at + piece])
            gva, size = gva + piece, size - piece
        return code

    def _take_io_trap(self) -> bool:
        """Tell whether the emulator stopped behind an access to a trapped port, and forget it: the next may not be."""
        if self._vector != VECTOR_DEBUG or not self._io_trapped:
            return False
        self._vector, self._io_trapped = None, False
        return True

    def _exception(self, engine: api.Engine, error: int) -> None:
        """The emulator stopped for an exception: an RDTSC, or the guest's end."""
        vector, self._vector = self._vector, None
        if vector in (VECTOR_GENERAL_PROTECTION, VECTOR_DOUBLE_FAULT):
            if self._emulate_rdtsc(engine):
                return
            if vector == VECTOR_DOUBLE_FAULT and not self._renewed:  # a fault after an RDTSC: which one?
                self._renew()
                return
        what = f"invalid instruction (emulator error {error})" if vector is None else exception_name(vector)
        raise GuestCrash(what + self._where())

    def _stopped_for_nothing(self, times: int) -> int:
        """The emulator stopped without a reason: a fault that it did not report."""
        if times == _STALE_STARTS:
            self._renew()
        elif times > 2 * _STALE_STARTS:
            raise VmError(f"the CPU emulator makes no progress at rip {self._rip:#x}")
        return times

    def _renew(self) -> None:
        """Replace the emulator by a fresh one in the same state, which reports exceptions by their names."""
        self.load(self.save())
        self._renewed = True
        if self._engine is not None:
            self._before_entry(self._engine)

    def _on_in(self, _engine: int, port: int, size: int, _data: int) -> int:
        try:
            self._io_trapped = is_trapped(port, size)
            return self._bus.port_read(port, size)
        except BaseException as error:
            self._on_failure(error)
            return 0

    def _on_out(self, _engine: int, port: int, size: int, value: int, _data: int) -> None:
        try:
            effect = self._bus.port_write(port, size, value & (1 << 8 * size) - 1)
            self._io_trapped = is_trapped(port, size)
            if effect is not None:
                self._on_effect(effect)
        except BaseException as error:
            self._on_failure(error)

    def _on_cpuid(self, _engine: int, _data: int) -> int:
        try:
            engine = self._engine
            assert engine is not None
            asked = (engine.get(register) & 0xFFFF_FFFF for register in (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RCX))
            for register, value in zip(_CPUID_REGISTERS, answer(self._cpuid, *asked), strict=True):
                engine.set(register, value)
        except BaseException as error:
            self._on_failure(error)
        return 1  # do not execute it

    # --- how a callback ends the run ---

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.stop()

    def _on_effect(self, effect: Effect) -> None:
        self._effect = effect
        self._stop()

    def _on_failure(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._stop()

    def _on_exception(self, _engine: int, vector: int, _data: int) -> None:
        self._vector = vector
        self._stop()

    def _on_system_call(self, _engine: int, _data: int) -> None:
        self._on_failure(GuestCrash("system call without a kernel"))  # Unicorn would go on as after a NOP

    def _crash(self) -> None:
        """Raise what a callback could not: the guest's end, with where it was, or our own failure."""
        error, self._failure = self._failure, None
        if isinstance(error, GuestPageFault):
            if error.error_code is not None:
                self._loaded = replace(self._loaded, cr2=error.gva)
            raise GuestCrash(error.describe() + self._where()) from None
        if isinstance(error, GuestCrash):
            raise GuestCrash(str(error) + self._where()) from None
        assert error is not None
        raise error

    def _where(self) -> str:
        """Return the registers that tell where the guest ended, for the crash message."""
        state = self.save()
        return (
            f" at rip {self._rip:#x} (rsp={state.rsp:#x} rflags={state.rflags:#x} "
            f"rax={state.rax:#x} cr2={state.cr2:#x} cr3={state.cr3:#x})"
        )
