"""A vCPU: Unicorn executes the instructions, our MMU answers its TLB, and we deliver its exceptions and interrupts.

Unicorn's physical addresses are machine addresses. On a TLB miss, or the first write to a page filled read-only, it
calls :meth:`SoftVcpu._tlb_fill`, which walks by what CR0, CR3, CR4, EFER and the privilege level are at that moment:
under nested paging (:mod:`.nested_mmu`) or through shadows (:mod:`.shadow_mmu`). The answer stays in Unicorn's TLB
until the guest flushes it (MOV to CR3, INVLPG: the emulator's own affair) or we do, on the vCPU's own thread before it
enters the guest again (law 2).

The vCPU runs in *slices*::

    flush what must be flushed -> let devices do what is due -> deliver what is pending -> run -> see why it stopped

    HLT                  sleep until an interrupt, a device's deadline or a kick
    exception, INT n     through the guest's IDT (:mod:`.exceptions`)
    page fault           the walk refused: the same, with the exact address in CR2
    SYSCALL, SYSENTER    :mod:`.system_calls`
    access to a port     its effect, if it has one (:mod:`.port_io`)
    blocks are over      the next slice

A slice ends between instructions, exactly (:mod:`.countdown`): after so many blocks of code, well under a millisecond;
before the next block when the vCPU is kicked; and before the first at which the guest takes an interrupt that waits.

A small guest of the ABI is nothing else to this CPU than a program in ring 3 without handlers: its first exception is a
triple fault, and so its end, a GuestCrash.

The time-stamp counter is the host's plus an offset: it runs at the host's rate, as under KVM, and goes on over save and
load from where it was.

Source: AMD APM volume 2, chapter 8; RFC for what a nested fault does.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from unicorn import unicorn_const as const
from unicorn import x86_const as x86

from pageferry.core import confined
from pageferry.core.cpuid import Leaves, answer
from pageferry.core.errors import GuestCrash, VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.run import Effect, InvalidateTlb
from pageferry.core.state import MpState, VcpuState, reset_state
from pageferry.devices.bus import DeviceBus
from pageferry.devices.interrupts import CpuInterrupts
from pageferry.hypervisor import exceptions
from pageferry.hypervisor import unicorn_api as api
from pageferry.hypervisor.exceptions import Delivery, Event, Kind
from pageferry.hypervisor.guest_walk import PF_FETCH, PF_WRITE, GuestPageFault
from pageferry.hypervisor.instructions import Instruction, decode
from pageferry.hypervisor.machine_memory import MachineMemory
from pageferry.hypervisor.mmio import MmioWindow
from pageferry.hypervisor.nested_mmu import NestedMmu
from pageferry.hypervisor.p2m import P2M
from pageferry.hypervisor.paging import Paging, Tlb
from pageferry.hypervisor.pending_events import PendingEvents
from pageferry.hypervisor.port_io import PortIo
from pageferry.hypervisor.registers import (
    CPL_MASK,
    CR0_PG,
    CR0_WP,
    CR4_PGE,
    CR4_SMAP,
    CR4_SMEP,
    CS,
    EFER_LMA,
    EFER_NXE,
    HFLAG2_NMI,
    HFLAG_CS64,
    HFLAG_INHIBIT_IRQ,
    HFLAG_IOBPT,
    RAX,
    RBX,
    RCX,
    RDX,
    RFLAGS_AC,
    RFLAGS_IF,
    RFLAGS_TF,
    RSP,
    SS,
    arm_breakpoints,
    check_supported,
    load_registers,
    save_registers,
)
from pageferry.hypervisor.shadow import ShadowPaging
from pageferry.hypervisor.shadow_mmu import ShadowMmu
from pageferry.hypervisor.system_calls import system_call, system_enter
from pageferry.hypervisor.system_memory import SystemMemory
from pageferry.hypervisor.tlb_memory import TlbMemory
from pageferry.hypervisor.translated_code import CodeSharing, TranslatedCode
from pageferry.hypervisor.unicorn_cpu import CR0, CR3, CR4, EFER, EFLAGS, HFLAGS

_U64 = (1 << 64) - 1
#: A tenth of a millisecond or so of plain code.
_SLICE_BLOCKS = 20_000
_NS_PER_S = 1e9
#: How long a device's deadline may be overdue while the guest runs.
_LOOK_AFTER_NS = 100_000
#: An instruction, and the same again if it has changed its own block.
_STEP_BLOCKS = 2
_PUSHF = 0x9C
_ICEBP, _MAX_INSTRUCTION_BYTES = b"\xf1", 15


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
        sharing: the domain's vCPUs, for the code that they translate.
        interrupts: the interrupt controllers; None: there are none.
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
        sharing: CodeSharing,
        interrupts: CpuInterrupts | None = None,
    ) -> None:
        self._machine = machine
        self._bus = bus
        self._cpuid = cpuid
        self.tlb = tlb
        tlb.hurry = self._hurry
        self._interrupts = interrupts
        if interrupts is not None:
            interrupts.on_raise = self._interrupt
        self._nested = NestedMmu(machine.words, p2m, paging)
        self._walker = self._nested.walker
        self.shadow_mmu = ShadowMmu(shadow, p2m, self._walker, paging, self._on_failure)
        self._translate = self._nested.translate
        self._memory = SystemMemory(machine, self._walker, self._translate, self._follow_as_supervisor)
        self._delivery = Delivery(self._memory, self._triple_fault)
        self._ports = PortIo(bus, self._memory, self._on_failure)
        self._mmio = MmioWindow(bus, self._on_failure)
        self._engine: api.Engine | None = None
        self._loaded = reset_state()
        self._pending = PendingEvents()
        self._halted = False
        self._kicked = False
        self._look_again_ns = 0  # when devices may have something to do
        self._awake = threading.Event()
        self._failure: BaseException | None = None
        self._refused: GuestPageFault | None = None
        self._vector: int | None = None
        self._system_call: int | None = None
        self._stepped = False
        self._controls = (0, 0, 0)
        self._words = self._halves = memoryview(b"")  # of the CPU's fields
        self._tlb_memory = TlbMemory(machine.mapping.hva)
        self._rests_on = self._nested.rests_on
        self._code = TranslatedCode(machine, tlb, self._tlb_memory, sharing, self._hurry)
        self._memory.written = self._code.note_written
        self._memory.write_table = shadow.write_table
        self._saving = threading.Lock()
        self._identity = False
        self._tlb_entries: dict[int, api.TlbEntry] = {}

    # --- what RunControl calls ---

    def run(self) -> Effect | None:
        """Run the guest until kicked or a device has an effect; see the protocol."""
        engine = self._engine
        if engine is None:
            raise VmError("this vCPU has no state yet", hint="load a state first")
        self._kicked = False
        while not self._kicked:
            engine.ready()
            self._before_entry(engine)
            event = None if self._code.stepping else self._next_event(engine)
            if event is not None:
                self._halted = False
                self._delivery.deliver(engine, event)
            if self._halted:
                self._sleep(engine)
                continue
            engine.cpu.fields.hflags |= HFLAG_IOBPT
            waits = self._interrupts is not None and self._interrupts.pending
            if not self._code.enter():
                continue
            if self._code.stepping:
                error = self._step(engine)
            else:
                error = engine.run(1 if self._pending else _SLICE_BLOCKS, interrupt=waits)
            self._code.leave()
            effect = self._stopped(engine, error)
            if isinstance(effect, InvalidateTlb):
                self._flush_tlb(engine)
            elif effect is not None:
                return effect
        return None

    def kick(self) -> None:
        """Make ``run`` return before the next block of code; any thread."""
        self._kicked = True
        self._awake.set()
        self._hurry()

    def _interrupt(self) -> None:
        engine = self._engine
        if engine is not None:
            engine.interrupt()
        self._awake.set()

    def _hurry(self) -> None:
        engine = self._engine
        if engine is not None:
            engine.hurry()

    # --- state; the vCPU is outside the guest ---

    def load(self, state: VcpuState) -> None:
        """Replace the state: a fresh emulator, so nothing of the old one can remain.

        Raises:
            UnsupportedError: not a state this machine can run; the vCPU keeps the old one.
        """
        check_supported(state)
        pending = PendingEvents.of_state(state)
        engine = api.Engine(self._machine.mapping.hva, self._machine.size_bytes)
        callback, data = self._tlb_memory.attach(engine.cpu.fields, api.TLB_FILL(self._tlb_fill))
        engine.hook(const.UC_HOOK_TLB_FILL, callback, data=data)
        engine.hook(const.UC_HOOK_INTR, api.INTERRUPT(self._on_exception))
        engine.hook_instruction(api.CPUID(self._on_cpuid), x86.UC_X86_INS_CPUID)
        engine.hook_instruction(api.SYSTEM_CALL(self._on_syscall), x86.UC_X86_INS_SYSCALL)
        engine.hook_instruction(api.SYSTEM_CALL(self._on_sysenter), x86.UC_X86_INS_SYSENTER)
        self._engine = engine
        self._words, self._halves = engine.cpu.words, engine.cpu.halves
        with self._machine_addresses():
            arm_breakpoints(engine, state)
        self._ports.attach(engine)
        self._mmio.attach(engine)
        self.shadow_mmu.attach(engine)
        load_registers(engine, state)
        engine.cpu.events.tsc_offset = state.tsc - api.host_ticks() & _U64
        self._pending = pending
        self._halted = state.mp_state is MpState.HALTED
        self._failure = self._refused = self._vector = self._system_call = None
        self._stepped = False
        self._code.clear()
        self._loaded = state
        self._controls = (0, 0, 0)
        self._follow()
        self.tlb.request_flush()

    def save(self) -> VcpuState:
        """Return the state; before any was loaded, that after reset."""
        engine = self._engine
        if engine is None:
            return self._loaded
        with self._saving:  # the emulator reads an MSR through the guest's own RAX, RCX and RDX
            tsc = api.host_ticks() + engine.cpu.events.tsc_offset & _U64
            state = save_registers(engine, self._loaded, tsc=tsc)
        mp_state = MpState.HALTED if self._halted else MpState.RUNNABLE
        return replace(state, mp_state=mp_state, **self._pending.fields())

    def set_tsc_back(self, ticks: int) -> None:
        """Let the TSC have counted so many ticks less; the vCPU is outside the guest."""
        if self._engine is not None:
            events = self._engine.cpu.events
            events.tsc_offset = events.tsc_offset - ticks & _U64

    def use_shadow(self, shadowed: bool) -> None:
        """Translate through the shadow tables (True), or by the nested walk; the vCPU is outside the guest."""
        mmu, walker = self.shadow_mmu, self._walker
        self._translate = self._memory.translate = mmu.translate if shadowed else self._nested.translate
        self._rests_on = mmu.rests_on if shadowed else self._nested.rests_on
        walker.nested_access = mmu.table_read if shadowed else self._nested.table_access
        walker.nested_update = mmu.table_write if shadowed else None
        self.tlb.request_flush()

    def close(self) -> None:
        """Free the emulator; the vCPU will not run again."""
        self._engine = None

    # --- entering ---

    def _before_entry(self, engine: api.Engine) -> None:
        stale = self._code.take_written()
        if stale:
            engine.flush_tlb()
            with self._machine_addresses():
                for maddr in stale:
                    engine.flush_code(maddr, PAGE_SIZE)
        if self.tlb.flush_wanted:
            self._flush_tlb(engine)
        elif self.tlb.protected:
            self._protect(engine)
        if self._interrupts is not None and (now_ns := time.monotonic_ns()) >= self._look_again_ns:
            self._look_again_ns = now_ns + _LOOK_AFTER_NS
            self._bus.advance()

    def _flush_tlb(self, engine: api.Engine) -> None:
        self.tlb.flush_wanted = False
        self.tlb.protected.clear()
        engine.flush_tlb()
        self._walker.flush()
        self._nested.flush()
        self._tlb_memory.forget()
        self._code.flushed()
        self.tlb.flushes += 1
        self.shadow_mmu.shadow.resync()

    def _protect(self, engine: api.Engine) -> None:
        """Flush the TLB because pages became guest tables; what is remembered of others stays."""
        with self.shadow_mmu.shadow.lock:  # which they become guest tables under
            self._forget_protected()
            self.tlb.protected.clear()
            engine.flush_tlb()
            self.tlb.flushes += 1
        self.shadow_mmu.shadow.resync()

    def _forget_protected(self) -> None:
        for maddr in tuple(self.tlb.protected):
            self._tlb_memory.forget_page(maddr)

    @contextmanager
    def _machine_addresses(self) -> Iterator[None]:
        """Let a gva be a machine address for the length of a ``with`` block; the TLB is flushed before and after."""
        self._identity = True
        try:
            with self._tlb_memory.unused():
                yield
        finally:
            self._identity = False

    def _next_event(self, engine: api.Engine) -> Event | None:
        """Return what is to be delivered before the next instruction."""
        fields = engine.cpu.fields
        event = self._pending.take(holds_nmi=bool(fields.hflags2 & HFLAG2_NMI or fields.hflags & HFLAG_INHIBIT_IRQ))
        if event is not None:
            return event
        if self._may_interrupt(engine):
            assert self._interrupts is not None
            return Event(vector=self._interrupts.acknowledge(), kind=Kind.EXTERNAL)
        return None

    def _may_interrupt(self, engine: api.Engine) -> bool:
        """Tell whether an interrupt is requested, and taken by the guest now."""
        fields = engine.cpu.fields
        if self._interrupts is None or not self._interrupts.pending:
            return False
        return bool(fields.eflags & RFLAGS_IF) and not fields.hflags & HFLAG_INHIBIT_IRQ

    def _sleep(self, engine: api.Engine) -> None:
        """Wait until there may be something to do; any of it sets ``_awake``, or is a deadline of the devices."""
        self._awake.clear()
        if self._kicked or self._may_interrupt(engine):
            return
        due_in_ns = None if self._interrupts is None else self._bus.due_in_ns()
        self._look_again_ns = 0
        self._awake.wait(None if due_in_ns is None else max(0, due_in_ns) / _NS_PER_S)

    def _step(self, engine: api.Engine) -> int:
        """Execute one instruction; return Unicorn's error number. A guest that steps by itself does just that."""
        fields, dr = engine.cpu.fields, engine.cpu.events.dr
        if fields.eflags & RFLAGS_TF:
            return engine.run(_STEP_BLOCKS)
        dr6, pushes_flags = dr[6], self._instruction().opcode == _PUSHF
        fields.eflags |= RFLAGS_TF
        error = engine.run(_STEP_BLOCKS)
        fields.eflags &= ~RFLAGS_TF
        if self._vector == exceptions.DEBUG:
            self._vector, self._stepped, dr[6] = None, True, dr6
            if pushes_flags:
                at = self._linear(engine, SS, fields.regs[RSP])
                self._memory.write(at, 2, self._memory.read(at, 2) & ~RFLAGS_TF)
        return error

    def _runs_from(self, maddr: int) -> bool:
        """Tell whether the instruction where the CPU is lies in a page of machine memory."""
        assert self._engine is not None
        rip = self._linear(self._engine, CS, self._engine.cpu.fields.eip)
        return maddr in self._memory.pages(rip, _MAX_INSTRUCTION_BYTES)

    def _linear(self, engine: api.Engine, segment: int, offset: int) -> int:
        """Return the gva of an offset into a segment."""
        fields = engine.cpu.fields
        return offset if fields.hflags & HFLAG_CS64 else fields.segs[segment].base + offset & 0xFFFF_FFFF

    # --- why it stopped ---

    def _stopped(self, engine: api.Engine, error: int) -> Effect | None:
        """See to what ended a slice; return the effect of an access to a port."""
        vector, self._vector = self._vector, None
        call, self._system_call = self._system_call, None
        engine.cpu.events.old_exception = -1  # it is delivered, or the guest never saw it
        if self._failure is not None:
            self._fail()
        event: Event | None = None
        effect: Effect | None = None
        if self._ports.stopped:
            effect, event = self._ports.take(engine)
        elif call is not None:
            event = self._enter_kernel(engine, call)
        elif error == const.UC_ERR_EXCEPTION:
            if self._code.refused:
                self._code.make_way(self._runs_from, lambda: self._kicked)
            else:
                event = self._page_fault(engine)
        elif error == const.UC_ERR_INSN_INVALID:
            event = self._invalid(engine)
        elif error:
            raise VmError(f"the CPU emulator failed with error {error} at rip {engine.cpu.fields.eip:#x}")
        elif vector is not None:
            event = self._exception(engine, vector)
        elif self._stepped:
            self._stepped = False
        elif not engine.out_of_blocks:
            self._halted = True
        if event is not None:
            self._delivery.deliver(engine, event)
        return effect

    def _invalid(self, engine: api.Engine) -> Event:
        """Return what an instruction is that the emulator does not know; ICEBP is among them."""
        rip = engine.cpu.fields.eip
        if self._memory.code(rip, 1) == _ICEBP:
            return Event(vector=exceptions.DEBUG, return_rip=rip + 1 & _U64)
        return Event(vector=exceptions.INVALID_OPCODE)

    def _page_fault(self, engine: api.Engine) -> Event:
        fault, self._refused = self._refused, None
        assert fault is not None
        fault.gva = engine.cpu.fault_address  # the TLB is asked for pages
        if fault.error_code is None and self._instruction().uses_stack:
            return Event(vector=exceptions.STACK_FAULT, error_code=0, detail=fault.describe())
        if fault.error_code is not None and not fault.error_code & (PF_WRITE | PF_FETCH):
            fault.error_code |= PF_WRITE if fault.access == "read" and self._instruction().changes_memory else 0
        return exceptions.page_fault(fault, fault.gva)

    def _instruction(self) -> Instruction:
        """Return the instruction where the CPU is."""
        assert self._engine is not None
        return decode(self._memory.code(self._engine.cpu.fields.eip, _MAX_INSTRUCTION_BYTES))

    def _exception(self, engine: api.Engine, vector: int) -> Event:
        events = engine.cpu.events
        if not events.is_software:
            return Event(vector=vector, error_code=events.error_code & 0xFFFF_FFFF)
        behind = engine.cpu.fields.eip
        engine.cpu.fields.eip = self._begin_of(behind, b"\xcd" + bytes([vector]), otherwise=1)
        return Event(vector=vector, kind=Kind.SOFTWARE, return_rip=behind)

    def _enter_kernel(self, engine: api.Engine, call: int) -> Event | None:
        behind = engine.cpu.fields.eip
        event = (system_call if call == x86.UC_X86_INS_SYSCALL else system_enter)(engine)
        if event is not None:
            engine.cpu.fields.eip = behind - 2
        return event

    def _begin_of(self, behind: int, code: bytes, *, otherwise: int) -> int:
        """Return where the instruction before ``behind`` begins: it is ``code``, or has ``otherwise`` bytes."""
        begin = behind - len(code) & _U64
        return begin if self._memory.code(begin, len(code)) == code else behind - otherwise & _U64

    def _triple_fault(self, first: Event) -> None:
        state = self.save()
        forbidden = None
        if confined.is_confined(state):
            code = self._memory.code(state.rip, confined.MAX_INSTRUCTION_BYTES)
            forbidden = confined.crash(code, rip=state.rip, rsp=state.rsp, rcx=state.rcx)
        raise forbidden or exceptions.crash(first, self._where())

    def _fail(self) -> None:
        """Raise what a callback could not: the guest's end, with where it was, or our own failure."""
        error, self._failure = self._failure, None
        if isinstance(error, GuestCrash):
            raise GuestCrash(str(error) + self._where()) from None
        assert error is not None
        raise error

    def _where(self) -> str:
        """Return the registers that tell where the guest ended, for the crash message."""
        state = self.save()
        return (
            f" at rip {state.rip:#x} (rsp={state.rsp:#x} rflags={state.rflags:#x} "
            f"rax={state.rax:#x} cr2={state.cr2:#x} cr3={state.cr3:#x})"
        )

    # --- the MMU: callbacks from inside the guest; none may raise ---

    def _tlb_fill(self, _engine: int, gva: int, access: int, entry_at: int, _data: int) -> int:
        try:
            entry = self._tlb_entries.get(entry_at)
            if entry is None:
                # SAFETY: the engine's own stack, valid during this call; the same few addresses come again.
                entry = self._tlb_entries[entry_at] = api.TlbEntry.from_address(entry_at)
            if self._identity:
                entry.paddr, entry.perms = gva, api.READ | api.WRITE | api.EXECUTE
                return 1
            self._follow()
            return self._walk_for_tlb(entry, gva, access)
        except BaseException as error:
            self._on_failure(error)
            return 0

    def _walk_for_tlb(self, entry: api.TlbEntry, gva: int, access: int) -> int:
        walker = self._walker
        write, fetch = access == api.ACCESS_WRITE, access == api.ACCESS_FETCH
        try:
            maddr, permissions = self._translate(gva, write, fetch)
        except GuestPageFault as fault:
            if not walker.user or not self._loads_descriptor(gva):
                self._refused = fault
                return 0
            walker.user = False
            maddr, permissions = self._translate(gva, write, fetch)
            self.tlb.request_flush()  # the program itself may not go there
        permitted = self._code.permit(maddr, permissions, write=write, fetch=fetch)
        if permitted is None:
            return 0
        entry.paddr, entry.perms = maddr, permitted
        if self.tlb.flush_wanted:  # the shadows were blown under our hands
            self._tlb_memory.forget()
            self._hurry()
        elif self.tlb.protected:  # a page became a guest table
            self._forget_protected()
            self._hurry()
        elif not walker.smap and maddr < self._machine.size_bytes and (rests_on := self._rests_on(gva)) is not None:
            cpl = self._halves[HFLAGS] & CPL_MASK
            for of in (access, api.ACCESS_READ) if write else (access,):
                self._tlb_memory.remember((gva, of, cpl), walker.cr3, rests_on, maddr, permitted)
        return 1

    def _follow(self) -> None:
        """Have the walker walk by what the CPU's registers say now."""
        words, walker = self._words, self._walker
        controls = words[CR0], words[CR4] & ~CR4_PGE, words[EFER]
        if controls != self._controls:
            self._follow_controls(*controls)
        cr3 = words[CR3]
        if cr3 != walker.cr3:
            walker.cr3 = cr3
        walker.user = self._halves[HFLAGS] & CPL_MASK == CPL_MASK
        if walker.smap:
            walker.alignment_check = bool(words[EFLAGS] & RFLAGS_AC)

    def _follow_controls(self, cr0: int, cr4: int, efer: int) -> None:
        walker = self._walker
        self._controls = cr0, cr4, efer
        walker.paging = bool(cr0 & CR0_PG)
        walker.write_protect = bool(cr0 & CR0_WP)
        walker.no_execute = bool(efer & EFER_NXE)
        walker.smep = bool(cr4 & CR4_SMEP)
        walker.smap = bool(cr4 & CR4_SMAP)
        walker.flush()
        self._tlb_memory.follow(cr0, cr4, efer)
        if walker.paging and not efer & EFER_LMA:
            raise GuestCrash("32-bit paging, which the software machine does not have")

    def _follow_as_supervisor(self) -> None:
        self._follow()
        self._walker.user = self._walker.alignment_check = False

    def _loads_descriptor(self, gva: int) -> bool:
        """Tell whether it is the CPU itself that reads there, for an instruction that loads a segment register."""
        assert self._engine is not None
        fields = self._engine.cpu.fields
        in_table = any(
            table.base & -PAGE_SIZE <= gva <= table.base + table.limit for table in (fields.gdt, fields.ldt, fields.tr)
        )
        return in_table and self._instruction().loads_descriptor

    # --- other callbacks ---

    def _on_cpuid(self, _engine: int, _data: int) -> int:
        try:
            engine = self._engine
            assert engine is not None
            regs = engine.cpu.fields.regs
            answers = answer(self._cpuid, regs[RAX] & 0xFFFF_FFFF, regs[RCX] & 0xFFFF_FFFF)
            regs[RAX], regs[RBX], regs[RCX], regs[RDX] = answers
        except BaseException as error:
            self._on_failure(error)
        return 1  # do not execute it

    def _on_exception(self, _engine: int, vector: int, _data: int) -> None:
        self._vector = vector
        self._stop()

    def _on_syscall(self, _engine: int, _data: int) -> None:
        self._system_call = x86.UC_X86_INS_SYSCALL
        self._stop()

    def _on_sysenter(self, _engine: int, _data: int) -> None:
        self._system_call = x86.UC_X86_INS_SYSENTER
        self._stop()

    def _on_failure(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._stop()

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.stop()
