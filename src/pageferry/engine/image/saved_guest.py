"""SavedGuest: a guest in a file, which is a libxc migration stream and nothing else (docs/reference/stream.md, part 1).

To open one reads all of it but the page data: every header, length and order is checked, the machine's state is
decoded, and for each page it is known where in the file its last content lies. A file that was cut anywhere is refused
here, by record and offset, before a machine is made. Page data is read when it is wanted, in any order.

The format has no place for the guest's size, and needs none: each frame of RAM is in it, with content or (XALLOC)
without, and each that was given back (XTAB).
"""

import os
import stat
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import runs_of
from pageferry.core.cpuid import Leaves
from pageferry.core.device_spec import SPECS_NAME, DeviceSpec, decode_specs
from pageferry.core.errors import RecordError, TruncatedError, UsageError, VmError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, PCI_HOLE_END, PCI_HOLE_START, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.os_hints import file_hint
from pageferry.core.ram import MAX_MEMORY_BYTES, ram_layout
from pageferry.core.state import PIC_NAME, MachineState
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.stream.decoder import Decoder
from pageferry.stream.format import BodyError
from pageferry.stream.hvm_context import state_in_stream
from pageferry.stream.intake import Need
from pageferry.stream.page_index import GONE, UNNAMED, PageIndex
from pageferry.stream.records import CpuidPolicy, HvmContext, PageDataHeader

_SHIFT = np.uint64(PAGE_SHIFT)
_HOLE_BYTES = PCI_HOLE_END - PCI_HOLE_START
_GFN_LIMIT = (MAX_MEMORY_BYTES + _HOLE_BYTES) >> PAGE_SHIFT
#: Most pages that one call reads: IOV_MAX buffers, each of a page at least.
_MAX_PAGES = 1024


class SavedGuest:
    """A guest in a file. A context manager; closed when collected at the latest.

    Args:
        path: the file.
        fd: a descriptor of it, which stays the caller's; None: it is opened.

    Raises:
        UsageError: the file does not exist, or is not a regular one.
        RemoteStreamError: it is not a whole stream, or of a guest that no machine here can hold; names record and
            offset.
        VmError: it cannot be read.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self.path = path
        self._fd = _open(path) if fd is None else os.dup(fd)
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            self._size_bytes = os.fstat(self._fd).st_size
            self._index = PageIndex(_GFN_LIMIT)
            cpuid, self.state = self._survey()
            self.config = VmConfig(
                memory_bytes=self._memory_bytes(),
                cpus=len(self.state.vcpus),
                cpu=cpuid,
                machine=_machine_of(self.state),
                devices=_devices_of(self.state),
            )
            self.data_pages = self._index.with_data()
            """The frames with content, uint64[n], in the order in which it lies in the file."""
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SavedGuest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._close()

    @property
    def removed(self) -> GfnArray:
        """The frames that the guest has given back, uint64[n] ascending."""
        return np.flatnonzero(self._index.places[: self._index.named_limit] == GONE).astype(np.uint64)

    def has_data(self, gfns: GfnArray) -> NDArray[np.bool_]:
        """Tell for each frame whether it has content, as bool[n]."""
        return self._index.places[gfns] > 0

    def read(self, gfns: GfnArray, views_of: Callable[[slice], list[memoryview]]) -> None:
        """Read pages to where they belong.

        Args:
            gfns: frames with content, uint64[n]; fastest in the order of file order.
            views_of: returns where ``gfns[piece]`` goes: views that take these pages one after another.

        Raises:
            TruncatedError: the file has become shorter.
            VmError: it cannot be read.
        """
        for piece in self._pieces(gfns):
            self._read(int(self._index.places[gfns[piece.start]]), views_of(piece))

    def load(self, memory: GuestMemory, gfns: GfnArray) -> None:
        """Read pages into a guest's memory; arguments and errors as for :meth:`read`."""
        memory.advice.make_huge(*runs_of(gfns))
        self.read(gfns, lambda piece: memory.views(*runs_of(gfns[piece])))
        memory.wrote(gfns)

    def content(self, gfns: GfnArray, buffer: NDArray[np.uint8]) -> memoryview:
        """Read pages into a buffer, one after another, zeros where the file has no content.

        Args:
            gfns: frames of RAM, uint64[n].
            buffer: uint8[], of 4,096 n bytes at least.

        Returns:
            The part of the buffer that was filled. Errors as for :meth:`read`.
        """
        filled = buffer[: gfns.size << PAGE_SHIFT]
        has_data = self.has_data(gfns)
        filled.reshape(-1, PAGE_SIZE)[~has_data] = 0
        slots = np.flatnonzero(has_data).astype(np.uint64)
        slots = slots[np.argsort(self._index.places[gfns[slots]])]

        def views_of(piece: slice) -> list[memoryview]:
            starts, lengths = runs_of(slots[piece])
            begins, ends = (starts << _SHIFT).tolist(), ((starts + lengths) << _SHIFT).tolist()
            return [filled.data[begin:end] for begin, end in zip(begins, ends, strict=True)]

        self.read(gfns[slots], views_of)
        return filled.data

    def _pieces(self, gfns: GfnArray) -> Iterator[slice]:
        """Cut a list of frames into slices whose content lies together in the file."""
        places = self._index.places[gfns]
        edges = (np.flatnonzero(np.diff(places) != PAGE_SIZE) + 1).tolist()
        for begin, end in pairwise([0, *edges, gfns.size]):
            for at in range(begin, end, _MAX_PAGES):
                yield slice(at, min(at + _MAX_PAGES, end))

    def _read(self, offset: int, views: list[memoryview]) -> None:
        at = 0
        while at < len(views):
            try:
                got = os.preadv(self._fd, views[at:], offset)
            except OSError as error:
                raise self._unreadable(error, offset) from error
            if not got:
                raise TruncatedError(f"{self.path} has become shorter since it was checked", offset=offset)
            offset += got
            while at < len(views) and got >= len(views[at]):
                got -= len(views[at])
                at += 1
            if got:
                views = [*views[:at], views[at][got:], *views[at + 1 :]]

    def _unreadable(self, error: OSError, offset: int) -> VmError:
        return VmError(f"cannot read {self.path} at byte {offset}: {error.strerror}", hint=file_hint(error))

    # -- what opening does -----------------------------------------------------------------------------------------

    def _survey(self) -> tuple[Leaves, MachineState]:
        decoder = Decoder(zero_copy=True, gfn_limit=_GFN_LIMIT)
        cpuid: Leaves = ()
        state: MachineState | None = None
        at = 0
        while not decoder.ended:
            event = decoder.next_event()
            if isinstance(event, Need):
                data = self._more(decoder.wanted_bytes, at)
                if not data:
                    decoder.eof()
                decoder.feed(data)
                at += len(data)
            elif isinstance(event, PageDataHeader):
                self._note(event, at)
                at += event.payload_bytes
                decoder.payload_received()
            elif isinstance(event, CpuidPolicy):
                cpuid = event.leaves
            elif isinstance(event, HvmContext):
                state = state_in_stream(event, end_offset=decoder.offset)
        if not cpuid:
            raise RecordError("the stream does not tell which CPU the guest has", record="CPUID_POLICY")
        if state is None:
            raise AssertionError("the decoder let an END pass without HVM_CONTEXT")
        return cpuid, state

    def _more(self, at_most_bytes: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, at_most_bytes, offset)
        except OSError as error:
            raise self._unreadable(error, offset) from error

    def _note(self, header: PageDataHeader, payload_offset: int) -> None:
        if payload_offset + header.payload_bytes > self._size_bytes:
            raise TruncatedError(
                f"the stream stops after {self._size_bytes} bytes", record="PAGE_DATA", offset=header.offset
            )
        try:
            self._index.note(header, payload_offset)
        except BodyError as error:
            raise RecordError(str(error), record="PAGE_DATA", offset=header.offset) from error

    def _memory_bytes(self) -> int:
        """Return the guest's size, of which every frame is named; nothing else has memory."""
        end = self._index.named_limit << PAGE_SHIFT
        memory_bytes = end if end <= PCI_HOLE_START else end - _HOLE_BYTES
        places = self._index.places[: self._index.named_limit]
        try:
            regions = ram_layout(memory_bytes)
        except UsageError as error:
            raise RecordError(f"{places.size} frames make no guest", record="PAGE_DATA", hint=error.hint) from error
        is_ram = np.zeros(places.size, np.bool_)
        for region in regions:
            is_ram[region.first_gfn : region.first_gfn + region.pages] = True
        for wrong, why in (
            (is_ram & (places == UNNAMED), "is RAM of the guest, and no record says what it holds"),
            (~is_ram & (places != UNNAMED) & (places != GONE), "is not RAM of the guest"),
        ):
            if wrong.any():
                raise RecordError(f"gfn {int(np.argmax(wrong)):#x} {why}", record="PAGE_DATA")
        return memory_bytes


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=file_hint(error)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is not a regular file", hint="restore reads page by page, in the order of need")
    return fd


def _devices_of(state: MachineState) -> tuple[DeviceSpec, ...]:
    for device in state.devices:
        if device.name == SPECS_NAME:
            try:
                return decode_specs(device.data)
            except ValueError as error:
                raise RecordError(f"device {SPECS_NAME}: {error}", record="HVM_CONTEXT") from error
    return ()


def _machine_of(state: MachineState) -> MachineModel:
    is_pc = any(device.name == PIC_NAME for device in state.devices)
    return MachineModel.PC if is_pc else MachineModel.PLAIN
