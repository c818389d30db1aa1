"""Saving a guest to a file, live: a migration whose stream goes to a disk.

::

    guest                    file
      |  ENABLE
      | == every page of RAM is named; pre-copy, round by round ==> a file without a name
      |  freeze the guest .................................... downtime begins
      | == stop-and-copy: what is dirty =====================>
      | == state, END =======================================>
      |  digest all of memory
      |  let it run on (a snapshot) .......................... downtime ends
      |                            on the disk; read back; equal to the digests; named FILE

The file is a pure libxc stream, and nothing in it is pageferry's (docs/reference/stream.md, part 1).

Postcondition on success: FILE is whole and proven, and the guest runs on here (or is paused, if it was); with ``stop``
it stays frozen here. Postcondition on failure: the guest is here, running or paused as it was, log-dirty is off, and
FILE is what it was.
"""

from collections.abc import Callable
from pathlib import Path

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.device_spec import DeviceKind, device_names
from pageferry.core.errors import GuestAt, MigrationError
from pageferry.core.events import Event, MigrationReport, Phase
from pageferry.core.frames import GfnArray
from pageferry.core.guest_time import WorkSample
from pageferry.core.host_cpu import HostCpu
from pageferry.core.memory import GuestMemory
from pageferry.core.policy import Policy
from pageferry.core.vm import Vm, VmStatus
from pageferry.engine.attempt import Attempt
from pageferry.engine.image.outlet import FileOutlet
from pageferry.engine.image.proof import AtPause
from pageferry.engine.image.save_file import as_save_error, commit, expect_all_pages, open_file
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.options import WireOptions
from pageferry.engine.pages.encode import PlainCoder
from pageferry.engine.pages.send import Lane, Lanes
from pageferry.engine.precopy import Precopy, last_dirty, stop_and_copy
from pageferry.engine.verify.cost import ProofCost
from pageferry.engine.verify.digests import RunDigests
from pageferry.stream.encoder import Encoder


class FileSink:
    """Sends pages into a file, which never answers.

    Args:
        memory: the guest's.
        lane: to the file.
    """

    def __init__(self, memory: GuestMemory, lane: Lane) -> None:
        self.lanes = Lanes(lane)
        self._memory = memory
        self._lane = lane

    def begin(self, gfns: GfnArray) -> None:
        """Name all of RAM but these frames as untouched: so the file tells the guest's size, and is sparse."""
        untouched = self._memory.all_ram() - DirtyBitmap.of(self._memory.gfn_limit, gfns)
        self._lane.name_untouched(untouched.gfns())

    def check(self) -> None:
        """Hear nothing."""

    def fence(self, number: int) -> None:
        """Wait for nothing: what was written is read back at the end."""


class _FileVerifier:
    """Knows what digesting at the pause will take; nothing is proven of a file while it is written.

    Args:
        attempt: whose guest is saved.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._accounts = attempt.accounts
        self._cost = ProofCost(attempt.guest.vm.memory, attempt.accounts, attempt.clock.now_s)

    def begin_round(self, dirty: DirtyBitmap) -> None:
        """Measure what a proof takes."""
        self._cost.measure()

    def due(self) -> RunDigests | None:
        """Return nothing."""
        return None

    def idle(self) -> bool:
        """Tell that there is nothing to wait for."""
        return True

    def wait(self) -> None:
        """Wait for nothing."""

    def pause_s(self, dirty: DirtyBitmap) -> float:
        """Return how long finding and digesting everything at a pause now would take."""
        return self._cost.found_s + self._cost.digest_s((self._accounts.populated | dirty).count())

    def close(self) -> None:
        """End nothing."""


class Save:
    """One attempt to save a guest.

    Args:
        vm: the guest; running or paused.
        path: of the file, absolute.
        policy: decides after each round.
        stop: leave the guest frozen when the file is whole, instead of letting it run on.
        host_cpu: the CPU that it runs on; None: not known.
        bandwidth_bytes_per_s: a cap on what is written, as :class:`~pageferry.engine.options.WireOptions` has it.
        pause_limit_s: how long a pause may take, as :class:`~pageferry.engine.options.MigrationOptions` has it.
        on_event: sees every event, on the thread that calls :meth:`run`.
        work_before: see :class:`~pageferry.engine.attempt.Attempt`.

    Raises:
        UsageError: the policy may switch before all pages are saved.
    """

    def __init__(
        self,
        vm: Vm,
        path: Path,
        policy: Policy,
        *,
        stop: bool = False,
        host_cpu: HostCpu | None = None,
        bandwidth_bytes_per_s: int | None = None,
        pause_limit_s: float | None = None,
        on_event: Callable[[Event], None],
        work_before: WorkSample | None = None,
    ) -> None:
        expect_all_pages(policy)
        self._vm = vm
        self._path = path
        self._stop = stop
        self._host_cpu = host_cpu
        wire = WireOptions(bandwidth_bytes_per_s=bandwidth_bytes_per_s)
        self._attempt = Attempt(
            vm, policy, wire=wire, pause_limit_s=pause_limit_s, file=path, on_event=on_event, work_before=work_before
        )
        self.job = self._attempt.job
        self._encoder = Encoder()

    def run(self) -> MigrationReport:
        """Save the guest; call once. ``job.report`` is set afterwards, also when this raises.

        Raises:
            MigrationError: it was not saved; the guest is here.
        """
        attempt, report, phase = self._attempt, self._attempt.report, self._attempt.clock.phase
        with attempt.under_way(self._as_migration_error):
            with phase(Phase.CONNECT):
                pages = int(self._vm.memory.populated()[1].sum())
                file = open_file(attempt, self._path, what="guest", pages=pages)
                if self._host_cpu is not None and (warning := self._host_cpu.warning) is not None:
                    attempt.warn(f"{warning}; restore it on a host with the same CPU")
                self._warn_of_disks()
            with attempt.precopy():
                attempt.expect_alive()
                file.send([self._encoder.header(), *map(self._encoder.record, attempt.guest.first_records())])
                coder = PlainCoder(self._vm.memory, self._encoder)
                lane = Lane(self._vm.memory, file, self._encoder, coder, says_zero=False, on_sent=attempt.accounts.sent)
                sink = FileSink(self._vm.memory, lane)
                report.stop_reason = Precopy(attempt, sink, _FileVerifier(attempt)).run().reason
            with phase(Phase.PAUSE):
                attempt.stop_guest()
            with phase(Phase.STOP_AND_COPY):
                stop_and_copy(attempt, sink, last_dirty(attempt))
            with phase(Phase.STATE):
                records = attempt.guest.last_records(paused=self._vm.status is VmStatus.PAUSED)
                file.send([self._encoder.record(record) for record in records])
            with phase(Phase.VERIFY):
                _, _, context, _ = records
                at_pause = AtPause.of(self._vm.memory, context.data)
            attempt.pause.end()  # also with stop: how long the file takes to settle is no reason to give up
            if not self._stop:
                attempt.guest.thaw()
                report.running_at_s = attempt.clock.now_s()
            attempt.guest.release()
            with phase(Phase.HANDOFF):
                self._prove(file, at_pause)
                if self._stop:
                    attempt.guest.release_backends()  # the process that restores the guest takes them
                commit(attempt, file, stop=self._stop)
        assert self.job.report is not None
        return self.job.report

    def _warn_of_disks(self) -> None:
        """A guest that runs on writes to its disks; the one in the file knows them as they are at the pause."""
        names = device_names(self._vm.config.devices)
        written = [
            name
            for name, spec in zip(names, self._vm.config.devices, strict=True)
            if spec.kind == DeviceKind.DISK and not spec.readonly
        ]
        if written and not self._stop:
            self._attempt.warn(
                f"{', '.join(written)} will change: restore the guest with a copy from now, or use --stop"
            )

    def _as_migration_error(self, error: Exception, guest_at: GuestAt) -> MigrationError:
        return as_save_error(error, self._path, phase=self._attempt.clock.current, guest_at=guest_at)

    def _prove(self, file: FileOutlet, at_pause: AtPause) -> None:
        """Read the file back and compare it with the guest at the pause."""
        file.settle()
        with SavedGuest(self._path, file.fileno()) as saved:
            at_pause.expect_in(saved, self.job.check)
        self._attempt.report.verified_pages = at_pause.pages
