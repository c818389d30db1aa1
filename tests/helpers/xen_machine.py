"""XenMachine: a domain of real Xen as a machine of the guest ABI, for the conformance kit.

Its devices are the ordinary ones: an *ioreq server* has Xen hand each access of the guest to a port or to the DMA
once by ``xl`` and used again, since that takes seconds: its memory is cleared and its vCPU's state replaced.

Source: Xen ``xen/include/public/hvm/dm_op.h``, ``hvm/ioreq.h``; Linux ``include/uapi/xen/privcmd.h``, ``evtchn.h``.
"""

import atexit
import contextlib
import ctypes
import mmap
import os
import select
import struct
import tempfile
from dataclasses import replace
from functools import cache

import numpy as np
from xen_guests import create, destroy, load_vcpus, low_memory

from pageferry.core.errors import GuestCrash, UnsupportedError
from pageferry.core.libc import libc
from pageferry.core.run import InvalidateTlb
from pageferry.core.vm import MachineModel
from pageferry.devices.standard_machine import StandardMachine
from pageferry.stream.hvm_context import decode_cpu
from pageferry.stream.hvm_entries import Typecode, split_entries
from pageferry.xen.domctl import Control
from pageferry.xen.log import XenLogDirty

_DM_OP, _MMAP_RESOURCE = 0x0010_5005, 0x0020_5007
_BIND_INTERDOMAIN, _NOTIFY = 0x0008_4501, 0x0004_4504
_CREATE, _MAP_RANGE, _SET_STATE, _DESTROY = 1, 3, 5, 6
_PORTS, _MMIO = 0, 1
_RANGES = ((_PORTS, 0x70, 0x71), (_PORTS, 0xE0, 0xFF), (_PORTS, 0x3F8, 0x3FF), (_MMIO, 0xFEB0_0000, 0xFEB0_0FFF))
_REQUEST = struct.Struct("<QQIIIHBB")  # addr, data, count, size, vp_eport, pad, state and flags, type
_STATE_AT, _DATA_AT = 30, 8
_NONE, _READY, _RESPONSE = 0, 1, 3
_READS = 1 << 5
_COPY = 1
_LOOK_S, _SOON_S = 0.05, 0.0005
_NAME, _MEMORY_BYTES = "kit", 16 << 20
#: As an entry state has it, and as QEMU's emulation of SVM wants it (pageferry.kvm.tss).
_BUSY_TSS, _TSS = 0x8B, 0x89


class IoreqServer:
    """What answers a domain's accesses; one vCPU."""

    def __init__(self, control, domid):
        self._control, self._domid = control, domid
        self._id = struct.unpack_from("<H", self._op(_CREATE, bytes(6)), 4)[0]
        self._page = mmap.mmap(control.privcmd.fileno(), 4096, flags=mmap.MAP_SHARED)
        self._bytes = np.frombuffer(self._page, np.uint8)
        where = int(self._bytes.__array_interface__["data"][0])
        # The frame of the synchronous requests is number 1 of the resource "ioreq server" (0).
        asked = ctypes.create_string_buffer(struct.pack("<HxxIIIQQ", domid, 0, self._id, 1, 1, where), 32)
        control.privcmd.ioctl(_MMAP_RESOURCE, asked)
        for kind, first, last in _RANGES:
            self._op(_MAP_RANGE, struct.pack("<HHIQQ", self._id, 0, kind, first, last))
        self._op(_SET_STATE, struct.pack("<HBB", self._id, 1, 0))
        self._events = os.open("/dev/xen/evtchn", os.O_RDWR | os.O_CLOEXEC)
        self._remote, self._local = None, None
        self._bind()

    def _op(self, op, fields):
        request = ctypes.create_string_buffer(struct.pack("<II", op, 0) + fields.ljust(64, b"\0"), 72)
        buffers = ctypes.create_string_buffer(struct.pack("<QQ", ctypes.addressof(request), 72), 16)
        asked = ctypes.create_string_buffer(struct.pack("<HHxxxxQ", self._domid, 1, ctypes.addressof(buffers)), 16)
        self._control.privcmd.ioctl(_DM_OP, asked)
        return request.raw[8:]

    def _bind(self):
        remote = self.request()[4]
        if remote and remote != self._remote:
            self._remote = remote
            self._local = _ioctl(self._events, _BIND_INTERDOMAIN, struct.pack("<II", self._domid, remote))
            os.set_blocking(self._events, False)

    def fileno(self):
        return self._events

    def request(self):
        return _REQUEST.unpack_from(self._page)

    @property
    def state(self):
        return self._page[_STATE_AT] & 0xF

    def heard(self):
        """Take the events that have come, and let more come."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._events, os.read(self._events, 4096))

    def answer(self, data=None):
        if data is not None:
            struct.pack_into("<Q", self._page, _DATA_AT, data)
        self._page[_STATE_AT] = self._page[_STATE_AT] & 0xF0 | _RESPONSE
        self._bind()
        _ioctl(self._events, _NOTIFY, struct.pack("<I", self._local))

    def close(self):
        self._op(_DESTROY, struct.pack("<HH", self._id, 0))
        os.close(self._events)


def _ioctl(fd, request, fields):
    """One ioctl; its value, which Python's own gives only where the argument is a number."""
    buffer = ctypes.create_string_buffer(fields, len(fields))
    value = libc.ioctl(fd, request, ctypes.addressof(buffer))
    assert value >= 0, os.strerror(ctypes.get_errno())
    return value


class XenVcpu:
    """The vCPU; implements :class:`pageferry.core.run.Vcpu`. The domain is held but for the length of ``run``."""

    def __init__(self, control, domid, bus, flush):
        self._control, self._domid, self._bus, self._flush = control, domid, bus, flush
        self.server = IoreqServer(control, domid)
        self._held = True
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def kick(self):
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"x")

    def run(self):
        self._let_go()
        try:
            return self._run()
        finally:
            self._hold()

    def close(self):
        self.server.close()
        os.close(self._woken)
        os.close(self._wake)

    def _hold(self):
        if not self._held:
            self._control.pause(self._domid)
            self._held = True

    def _let_go(self):
        if self._held:
            self._control.unpause(self._domid)
            self._held = False

    def _run(self):
        kicked = False
        while True:
            if self.server.state == _READY:
                effect = self._answer()
                if isinstance(effect, InvalidateTlb):
                    self._flush()
                elif effect is not None:
                    return effect
                self._let_go()
            if kicked:
                self._hold()
                if self.server.state == _NONE:
                    return None  # at rest, with no access under way
                if self.server.state == _READY:
                    continue
                self._let_go()
            ready, _, _ = select.select([self.server, self._woken], [], [], _SOON_S if kicked else _LOOK_S)
            if self.server in ready:
                self.server.heard()
            if self._woken in ready:
                os.read(self._woken, 4096)
                kicked = True
            if not ready and self._control.info(self._domid).shutdown_reason is not None:
                raise GuestCrash("the domain has shut down by itself")

    def _answer(self):
        """Answer an access; after one that has an effect the domain is held, so that it goes no further."""
        address, data, _, size, _, _, flags, kind = self.server.request()
        if flags & _READS:
            read = self._bus.mmio_read if kind == _COPY else self._bus.port_read
            self.server.answer(read(address, size))
            return None
        write = self._bus.mmio_write if kind == _COPY else self._bus.port_write
        effect = write(address, size, data & ((1 << 8 * size) - 1))
        if effect is not None:
            self._hold()
        self.server.answer()
        return effect


class _Domain:
    """The one domain of this process and a paging mode; made anew after its guest has crashed."""

    def __init__(self, paging):
        self.control = Control()
        self.name = f"{_NAME}-{paging}"
        self.more = f"hap = {int(paging == 'hap')}"
        self.folder = tempfile.mkdtemp()
        self.domid = None

    def ready(self):
        if self.domid is not None and self.control.info(self.domid).shutdown_reason is None:
            return self.domid
        self.end()
        try:
            self.domid = create(self.folder, self.name, memory_mib=_MEMORY_BYTES >> 20, more=self.more)
        except AssertionError as error:
            if "domain creation fail: Operation not supported" not in str(error):
                raise
            raise UnsupportedError("paging", f"this Xen makes no domain with {self.more}") from error
        return self.domid

    def end(self):
        destroy(self.name)
        self.domid = None


@cache
def the_domain(paging):
    domain = _Domain(paging)
    atexit.register(domain.end)
    return domain


class XenMachine(StandardMachine):
    """A machine of the model PLAIN with one vCPU; its tracker is ``xen``. ``paging``: ``hap`` or ``shadow``."""

    def __init__(self, config, *, paging="hap"):
        if config.cpus != 1 or config.machine is not MachineModel.PLAIN or config.memory_bytes > _MEMORY_BYTES:
            raise UnsupportedError("xen-machine", "only one vCPU, no PC, and at most 16 MiB")
        domain = the_domain(paging)
        self.control, self.domid = domain.control, domain.ready()
        memory = low_memory(self.control, self.domid, config.memory_bytes)
        np.frombuffer(memory.mapping.view, np.uint8)[: config.memory_bytes] = 0
        super().__init__(config, memory, ())
        self.vcpu = XenVcpu(self.control, self.domid, self.platform.bus, self._flush_tlb)
        self._attach([self.vcpu], XenLogDirty(self.control, self.domid, memory, hap=paging == "hap"))

    @property
    def accel(self):
        return "xen"

    def _save_vcpus(self):
        for entry in split_entries(self.control.hvm_context(self.domid)):
            if entry.typecode == Typecode.CPU:
                vcpu = decode_cpu(entry)
                return (replace(vcpu, tr=replace(vcpu.tr, attributes=_BUSY_TSS)),)
        raise AssertionError("Xen has saved no vCPU")

    def _load_vcpus(self, vcpus, tsc_khz):
        load_vcpus(self.control, self.domid, [replace(each, tr=replace(each.tr, attributes=_TSS)) for each in vcpus])

    def _flush_tlb(self):
        load_vcpus(
            self.control,
            self.domid,
            [replace(each, tr=replace(each.tr, attributes=_TSS)) for each in self._save_vcpus()],
        )

    def _tsc_khz(self):
        return None

    def _set_tsc_back(self, ticks):
        pass

    def _save_kvm_clock(self):
        return None

    def _load_kvm_clock(self, clock_ns):
        pass

    def await_memory(self, fetch, absent):
        raise UnsupportedError("xen-machine", "the pages of a domain cannot be absent")

    def _free(self):
        self._log_dirty.off()
        self.vcpu.close()
