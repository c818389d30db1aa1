"""Saving a guest to a file, live: a migration whose stream goes to a disk.

::

    guest                    file
      |  ENABLE
      | == every page of RAM is named; pre-copy, round by round ==> FILE.part
      |  freeze the guest .................................... downtime begins
      | == stop-and-copy: what is dirty =====================>
      | == state, END =======================================>
      |  digest all of memory
      |  let it run on (a snapshot) .......................... downtime ends
      |                            on the disk; read back; equal to the digests; renamed to FILE

The file is a pure libxc stream, and nothing in it is pageferry's (docs/stream.md, part 1). Postcondition on success:
FILE is whole and proven, and the guest runs on here (or is paused, if it was); with ``stop`` it stays frozen here.
Postcondition on failure: the guest is here, running or paused as it was, log-dirty is off, and FILE is what it was.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import GuestAt, MigrationError, PageferryError, UsageError, VmError
from pageferry.core.events import Event, Phase
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.guest_time import WorkSample
from pageferry.core.policy import Policy
from pageferry.core.units import format_size
from pageferry.core.vm import Vm
from pageferry.engine.copying import Copying
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.image.sink import FileSink
from pageferry.engine.options import WireOptions
from pageferry.engine.pages.encode import PlainCoder
from pageferry.engine.pages.lane import Lane
from pageferry.engine.pages.lanes import Lanes
from pageferry.engine.verify.file import AtPause
from pageferry.engine.verify.prove import VerifyMode
from pageferry.stream.format import MAX_PAGES_PER_RECORD, PageType
from pageferry.stream.records import HvmContext


class Save(Copying):
    """One attempt to save a guest.

    Args:
        vm: the guest; running or paused.
        path: of the file, absolute.
        policy: decides after each round.
        stop: leave the guest frozen when the file is whole, instead of letting it run on.
        bandwidth_bytes_per_s: a cap on what is written, as :class:`~pageferry.engine.options.WireOptions` has it.
        on_event: sees every event, on the thread that calls :meth:`run`.
        work_before: see :class:`~pageferry.engine.attempt.Attempt`.
    """

    _downtime_phases = (Phase.PAUSE, Phase.STOP_AND_COPY, Phase.STATE, Phase.VERIFY)

    def __init__(
        self,
        vm: Vm,
        path: Path,
        policy: Policy,
        *,
        stop: bool = False,
        bandwidth_bytes_per_s: int | None = None,
        on_event: Callable[[Event], None],
        work_before: WorkSample | None = None,
    ) -> None:
        mode = VerifyMode.FULL  # nobody is there to audit a file while it is written
        wire = WireOptions(bandwidth_bytes_per_s=bandwidth_bytes_per_s)
        super().__init__(vm, policy, verify=mode, wire=wire, hold=False, on_event=on_event, work_before=work_before)
        self.path = path
        self._file = str(path)
        self._stop = stop

    @property
    def handing_over(self) -> bool:
        """Whether the file may have its name already, and the guest is not ours to pause or resume."""
        return self._committed and self._stop

    def take_back(self) -> None:
        """Let a guest run on that was saved and stopped; the caller knows that nobody has restored it.

        Raises:
            VmError: it was not stopped.
        """
        if self.guest_at is not GuestAt.DESTINATION:
            raise VmError("there is no guest to take back")
        self.guest_at = GuestAt.SOURCE
        self._thaw()

    def _go(self) -> None:
        phase = self._clock.phase
        with phase(Phase.CONNECT):
            sink = self._open()
        with phase(Phase.PRECOPY):
            self._precopy(sink)
        with phase(Phase.PAUSE):
            self._pause()
        with phase(Phase.STOP_AND_COPY):
            self._stop_and_copy()
        with phase(Phase.STATE):
            context = self._state(sink)
        with phase(Phase.VERIFY):
            at_pause = AtPause.of(self._vm.memory, context)
        if not self._stop:
            self._thaw()
            self._running_at_s = self._clock.now_s()
        self._disarm()
        with phase(Phase.HANDOFF):
            self._prove(sink, at_pause)
            self._commit(sink)

    def _as_migration_error(self, error: Exception, guest_at: GuestAt) -> MigrationError:
        if isinstance(error, PageferryError):  # before OSError: a KvmError is both, and no fault of the disk
            reason, hint = str(error), error.hint
        elif isinstance(error, OSError):
            reason = f"cannot write {self.path}: {error.strerror or error}"
            hint = "nothing is left of it; save where there is room"
        else:
            reason, hint = f"internal error: {error!r}", ""
        return MigrationError(reason, phase=str(self._clock.current), guest_at=guest_at, hint=hint)

    def _fall_back(self) -> None:
        self._running_at_s = None
        super()._fall_back()

    def _open(self) -> FileSink:
        sink = FileSink(self.path)
        sink.pacer = self._pacer
        with self._commit_lock:
            self._channels.append(sink)
        needed_bytes = int(self._vm.memory.populated()[1].sum()) * PAGE_SIZE
        free_bytes = sink.free_bytes()
        if needed_bytes > free_bytes:
            needed, free = format_size(needed_bytes), format_size(free_bytes)
            raise UsageError(
                f"the guest holds {needed}, and {self.path.parent} has {free} free",
                hint="make room there, or save elsewhere",
            )
        coder = PlainCoder(self._vm.memory, self._encoder)
        lane = Lane(self._vm.memory, sink, self._encoder, coder, says_zero=False, on_sent=self._on_sent)
        self._lanes = Lanes(lane)
        return sink

    def _precopy(self, sink: FileSink) -> None:
        self._expect_alive()
        static = (self._encoder.record(record) for record in self._static_records())
        sink.send([self._encoder.header(), *static])
        self._copy_running()

    def _before_rounds(self, gfns: GfnArray) -> None:
        """Write that all but these have memory and no content: the file tells the guest's size, and is sparse."""
        untouched = self._vm.memory.all_ram() - DirtyBitmap.of(self._vm.memory.gfn_limit, gfns)
        types = np.full(MAX_PAGES_PER_RECORD, PageType.XALLOC, np.uint8)
        named = untouched.gfns()
        for at in range(0, named.size, MAX_PAGES_PER_RECORD):
            batch = named[at : at + MAX_PAGES_PER_RECORD]
            self._channels[0].send([self._encoder.page_data(batch, types[: batch.size])])

    def _state(self, sink: FileSink) -> bytes:
        records = self._final_records()
        sink.send([self._encoder.record(record) for record in records])
        return next(record.data for record in records if isinstance(record, HvmContext))

    def _prove(self, sink: FileSink, at_pause: AtPause) -> None:
        sink.settle()
        with SavedGuest(self.path, sink.fileno()) as saved:
            at_pause.expect_in(saved, self._before_record)
        self._prover.verified_pages = at_pause.pages

    def _commit(self, sink: FileSink) -> None:
        with self._commit_lock:
            if self._cancelled:
                raise self._abort("cancelled")
            self._committed = True
        try:
            sink.commit()
        except OSError:
            self._committed = False
            raise
        sink.close()
        if self._stop:
            self.guest_at = GuestAt.DESTINATION
