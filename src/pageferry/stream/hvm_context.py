"""vCPU and device state as an HVM context: :class:`~pageferry.core.state.MachineState` <-> bytes.

An HVM context is a sequence of entries, each with a typecode, an instance and a length. CPU has Xen's layout; what else
a vCPU has is in :mod:`.hvm_vcpu`; devices travel under typecodes of our own, far from Xen's. What is decoded is checked
in full: an entry that no machine here can hold is refused, since a guest that loses it silently is not the same guest.

Source: docs/reference/stream.md, part 1, "HVM context".
"""

from collections.abc import Mapping
from dataclasses import replace
from struct import Struct
from struct import error as StructError
from types import MappingProxyType

from pageferry.core.errors import LocalStreamError, RecordError
from pageferry.core.state import DescriptorTable, DeviceState, MachineState, Segment, VcpuState
from pageferry.stream.format import padding_bytes
from pageferry.stream.hvm_entries import Entry, Typecode, join_entries, split_entries
from pageferry.stream.hvm_vcpu import VCPU_TYPECODES, decode_vcpu_entries, encode_vcpu_entries
from pageferry.stream.records import HvmContext

#: HEADER: magic u32, version u32, changeset u64, cpuid u32, gtsc_khz u32.
HEADER_BODY = Struct("<IIQII")
#: DEVICE: name length u16, reserved u16, data length u32; then the name (ASCII), then the data.
DEVICE_HEAD = Struct("<HHI")
#: KVM_CLOCK: nanoseconds.
CLOCK_BODY = Struct("<Q")

MAGIC = 0x54381286
VERSION = 1
#: "Not known", as Xen writes it where it was built without one.
NO_CHANGESET = 0xFFFF_FFFF_FFFF_FFFF
MAX_VCPUS = 1024
MAX_DEVICES = 1024
MAX_DEVICE_NAME_BYTES = 64

_GPRS = [
    *("rax", "rbx", "rcx", "rdx", "rbp", "rsi", "rdi", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
]
_CONTROL = ["cr0", "cr2", "cr3", "cr4", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7"]
_SEGMENTS = ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr"]
_TABLES = ["idtr", "gdtr"]
_SYSENTER = ["sysenter_cs", "sysenter_esp", "sysenter_eip", "shadow_gs"]
_SYSCALL = ["lstar", "star", "cstar", "syscall_mask", "efer", "tsc_aux"]
FPU_BYTES = 512
#: fpu_regs; general; control and debug; selectors; limits; bases; arbytes; sysenter and shadow_gs; msr_flags and
#: syscall; tsc; pending_event, error_code, flags, pad.
CPU_BODY = Struct(f"<{FPU_BYTES}s18Q10Q8I10I10Q8I4Q7QQ4I")
CPU_FPU_INITIALISED = 1 << 0

#: Entries that are not of one vCPU.
_OF_THE_MACHINE = (Typecode.CPU, Typecode.KVM_CLOCK, Typecode.PAUSED, Typecode.DEVICE)


def encode_cpu(vcpu: VcpuState) -> bytes:
    """Return the 1,032 bytes of a CPU entry.

    An ``fpu_regs`` of zeros is an FPU that was never initialised, as in a vCPU that did not use it yet.

    Raises:
        LocalStreamError: a field does not fit its width.
    """
    segments = [getattr(vcpu, name) for name in _SEGMENTS]
    tables = [getattr(vcpu, name) for name in _TABLES]
    if len(vcpu.fpu_regs) != FPU_BYTES:
        raise LocalStreamError(f"fpu_regs has {len(vcpu.fpu_regs)} bytes, not {FPU_BYTES}", record="HVM_CONTEXT CPU")
    try:
        return CPU_BODY.pack(
            vcpu.fpu_regs,
            *(getattr(vcpu, name) for name in _GPRS + _CONTROL),
            *(segment.selector for segment in segments),
            *(place.limit for place in segments + tables),
            *(place.base for place in segments + tables),
            *(segment.attributes for segment in segments),
            *(getattr(vcpu, name) for name in _SYSENTER),
            0,  # msr_flags: obsolete
            *(getattr(vcpu, name) for name in _SYSCALL),
            vcpu.tsc,
            vcpu.pending_event,
            vcpu.error_code,
            CPU_FPU_INITIALISED if any(vcpu.fpu_regs) else 0,
            0,
        )
    except StructError as error:
        raise LocalStreamError("a register does not fit its width", record="HVM_CONTEXT CPU") from error


def decode_cpu(entry: Entry, others: Mapping[Typecode, Entry] = MappingProxyType({})) -> VcpuState:
    """Return the vCPU of a CPU entry: the exact inverse of :func:`encode_cpu`.

    Args:
        entry: with typecode CPU.
        others: the vCPU's other entries, at most one of each type.

    Raises:
        RecordError: the length is wrong, or a reserved, obsolete or 16-bit field has bits it must not have, or another
            entry is malformed.
    """
    if len(entry.body) != CPU_BODY.size:
        raise entry.refusal(f"a body of {len(entry.body)} bytes, not {CPU_BODY.size}")
    values = iter(CPU_BODY.unpack(entry.body))
    fpu_regs: bytes = next(values)
    registers: dict[str, int] = {name: next(values) for name in _GPRS + _CONTROL}
    selectors = [next(values) for _ in _SEGMENTS]
    limits = [next(values) for _ in _SEGMENTS + _TABLES]
    bases = [next(values) for _ in _SEGMENTS + _TABLES]
    attributes = [next(values) for _ in _SEGMENTS]
    registers |= {name: next(values) for name in _SYSENTER}
    msr_flags = next(values)
    registers |= {name: next(values) for name in [*_SYSCALL, "tsc", "pending_event", "error_code"]}
    flags, pad = values
    if msr_flags or pad or flags & ~CPU_FPU_INITIALISED:
        raise entry.refusal("msr_flags, pad or an unknown flag is not 0")
    if bool(flags) != any(fpu_regs):
        raise entry.refusal("the FPU flag does not agree with fpu_regs")
    if max(*selectors, *attributes) > 0xFFFF:
        raise entry.refusal("a selector or segment attribute does not fit 16 bits")
    segments = {
        name: Segment(selector=selector, base=base, limit=limit, attributes=attribute)
        for name, selector, base, limit, attribute in zip(
            _SEGMENTS, selectors, bases[:8], limits[:8], attributes, strict=True
        )
    }
    tables = {
        name: DescriptorTable(base=base, limit=limit)
        for name, base, limit in zip(_TABLES, bases[8:], limits[8:], strict=True)
    }
    state = VcpuState(**registers, **segments, **tables, fpu_regs=fpu_regs)  # type: ignore[arg-type]
    return replace(state, **decode_vcpu_entries(others, fpu_regs))


def encode_machine_state(state: MachineState) -> bytes:
    """Return ``state`` as an HVM context.

    Raises:
        LocalStreamError: the state is larger than the format allows, or a field does not fit.
    """
    entries = [Entry(typecode=Typecode.HEADER, body=_encode_header(state.tsc_khz))]
    for index, vcpu in enumerate(state.vcpus):
        entries.append(Entry(typecode=Typecode.CPU, instance=index, body=encode_cpu(vcpu)))
        entries += encode_vcpu_entries(index, vcpu)
    if state.kvm_clock_ns is not None:
        entries.append(Entry(typecode=Typecode.KVM_CLOCK, body=_encode_clock(state.kvm_clock_ns)))
    if state.paused:
        entries.append(Entry(typecode=Typecode.PAUSED))
    entries += [
        Entry(typecode=Typecode.DEVICE, instance=index, body=_encode_device(device))
        for index, device in enumerate(state.devices)
    ]
    entries.append(Entry(typecode=Typecode.END))
    data = join_entries(entries)
    try:
        decode_machine_state(data)  # the reader's limits are the writer's too
    except RecordError as error:
        raise LocalStreamError("the machine state cannot be read back", record="HVM_CONTEXT") from error
    return data


def decode_machine_state(data: bytes) -> MachineState:
    """Return the machine in an HVM context.

    Raises:
        RecordError: the context is malformed, incomplete, or holds state that no machine here has (Xen's own
            devices); ``offset`` counts from the context's first byte.
    """
    header, *entries, _ = split_entries(data)
    tsc_khz = _decode_header(header)
    places: dict[Typecode, dict[int, Entry]] = {typecode: {} for typecode in (*_OF_THE_MACHINE, *VCPU_TYPECODES)}
    for entry in entries:
        place = places.get(entry.typecode)  # type: ignore[call-overload]  # an int finds an IntEnum
        if place is None:
            raise entry.refusal("no machine here can hold this state")
        if entry.instance in place:
            raise entry.refusal("it may come only once")
        place[entry.instance] = entry
    cpus, clocks, pauses, devices = (places.pop(code) for code in _OF_THE_MACHINE)
    if not 0 < len(cpus) <= MAX_VCPUS or len(devices) > MAX_DEVICES:
        raise RecordError(f"{len(cpus)} vCPUs and {len(devices)} devices", record="HVM_CONTEXT")
    for entry in (*cpus.values(), *(entry for place in places.values() for entry in place.values())):
        if entry.instance >= len(cpus):
            raise entry.refusal(f"there are only {len(cpus)} vCPUs")
    if (lapics := len(places[Typecode.LAPIC])) not in (0, len(cpus)):
        raise RecordError(f"{lapics} local APICs and {len(cpus)} vCPUs", record="HVM_CONTEXT")
    vcpus = tuple(
        decode_cpu(cpus[n], {typecode: place[n] for typecode, place in places.items() if n in place})
        for n in range(len(cpus))
    )
    return MachineState(
        vcpus=vcpus,
        devices=_decode_devices(devices),
        tsc_khz=tsc_khz,
        kvm_clock_ns=_decode_clock(clocks),
        paused=_decode_paused(pauses),
    )


def state_in_stream(record: HvmContext, *, end_offset: int) -> MachineState:
    """Return the machine in an HVM_CONTEXT record of a stream.

    Args:
        record: the record.
        end_offset: of the first byte in the stream after it.

    Raises:
        RecordError: as :func:`decode_machine_state`, with offsets in the stream.
    """
    size_bytes = len(record.data)
    try:
        return decode_machine_state(record.data)
    except RecordError as error:
        offset = end_offset - padding_bytes(size_bytes) - size_bytes + (error.offset or 0)
        raise RecordError(error.reason, record=error.record, offset=offset) from error


def _encode_header(tsc_khz: int | None) -> bytes:
    try:
        return HEADER_BODY.pack(MAGIC, VERSION, NO_CHANGESET, 0, tsc_khz or 0)
    except StructError as error:
        raise LocalStreamError("the TSC's rate does not fit its width", record="HVM_CONTEXT HEADER") from error


def _decode_header(entry: Entry) -> int | None:
    """Return the rate of the guest's TSC."""
    if len(entry.body) != HEADER_BODY.size:
        raise entry.refusal(f"a body of {len(entry.body)} bytes, not {HEADER_BODY.size}")
    magic, version, _, _, tsc_khz = HEADER_BODY.unpack(entry.body)
    if magic != MAGIC or version != VERSION:
        raise entry.refusal(f"magic {magic:#x} and version {version}")
    return tsc_khz or None


def _encode_clock(clock_ns: int) -> bytes:
    try:
        return CLOCK_BODY.pack(clock_ns)
    except StructError as error:
        raise LocalStreamError("the clock does not fit its width", record="HVM_CONTEXT KVM_CLOCK") from error


def _decode_clock(entries: dict[int, Entry]) -> int | None:
    for entry in entries.values():
        if entry.instance or len(entry.body) != CLOCK_BODY.size:
            raise entry.refusal(f"a body of {len(entry.body)} bytes, not {CLOCK_BODY.size}, or an instance")
        (clock_ns,) = CLOCK_BODY.unpack(entry.body)
        return int(clock_ns)
    return None


def _decode_paused(entries: dict[int, Entry]) -> bool:
    for entry in entries.values():
        if entry.instance or entry.body:
            raise entry.refusal(f"a body of {len(entry.body)} bytes, not none, or an instance")
    return bool(entries)


def _encode_device(device: DeviceState) -> bytes:
    try:
        name = device.name.encode("ascii")
        return DEVICE_HEAD.pack(len(name), 0, len(device.data)) + name + device.data
    except (UnicodeEncodeError, StructError) as error:
        raise LocalStreamError(f"device {device.name!r} cannot be written", record="HVM_CONTEXT DEVICE") from error


def _decode_devices(entries: dict[int, Entry]) -> tuple[DeviceState, ...]:
    devices: dict[str, DeviceState] = {}
    for index, entry in sorted(entries.items()):
        if index != len(devices):
            raise entry.refusal(f"device {len(devices)} is missing")
        device = _decode_device(entry)
        if device.name in devices:
            raise entry.refusal(f"device {device.name!r} comes twice")
        devices[device.name] = device
    return tuple(devices.values())


def _decode_device(entry: Entry) -> DeviceState:
    if len(entry.body) < DEVICE_HEAD.size:
        raise entry.refusal("its head is cut")
    name_bytes, reserved, data_bytes = DEVICE_HEAD.unpack_from(entry.body)
    rest = entry.body[DEVICE_HEAD.size :]
    if reserved or not 0 < name_bytes <= MAX_DEVICE_NAME_BYTES or len(rest) != name_bytes + data_bytes:
        raise entry.refusal(f"a name of {name_bytes} and data of {data_bytes} bytes in {len(entry.body)}")
    name = rest[:name_bytes]
    if not all(0x21 <= byte <= 0x7E for byte in name):
        raise entry.refusal("its name is not printable ASCII")
    return DeviceState(name=name.decode("ascii"), data=rest[name_bytes:])
