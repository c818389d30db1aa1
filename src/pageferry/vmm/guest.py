"""Guest: this process's guest: its machine, name, console and work, and the file that it is still read from."""

import threading
import time
from collections.abc import Callable

from pageferry.core.machine import Machine
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.engine.image.lazy import LazyRestore
from pageferry.vmm.accel import Machines
from pageferry.vmm.console import ConsoleTail
from pageferry.vmm.qmp_error import QmpError
from pageferry.vmm.work_meter import WorkMeter

_PAUSE_PATIENCE_S = 5.0
_POLL_S = 0.001


class Guest:
    """The one guest of a process; empty until its boot, restore or arrival.

    Args:
        machines: the kind of machine that it is to have.
        on_console: sees its console output.
    """

    def __init__(self, machines: Machines, on_console: Callable[[bytes], None]) -> None:
        self._asked_for = machines
        self.machines = machines
        """The kind of machine that it has, or is to have."""
        self.lock = threading.Lock()
        """Taken to look whether the guest is here, and kept until what depends on that is done: stop, cont, the begin
        of a migration, following the console; also by an arrival and by the end of a migration, which change it. Its
        holder may wait for the vCPUs to stop, and so for a page. It is the outermost lock. Reading ``vm`` needs none:
        it is replaced as a whole."""
        self.name = "incoming"
        self.vm: Machine | None = None
        """The machine; None while a guest is waited for."""
        self.console = ConsoleTail()
        self.work = WorkMeter()
        self.lazy: LazyRestore | None = None
        """The restore from a file that is read while it runs; None: it was not restored in that way."""
        self._on_console = on_console

    def make_vm(self, config: VmConfig) -> Machine:
        """Make its machine, of the kind that suits it; it is not adopted yet.

        Raises:
            PageferryError: no such machine can be made here.
        """
        self.machines = self._asked_for.suited_to(config.machine)
        return self.machines.make_vm(config)

    def adopt(self, vm: Machine, name: str, lazy: LazyRestore | None = None) -> None:
        """Be this guest; under the lock, or before another thread runs."""
        vm.on_console(self._console_byte)
        self.name, self.lazy = name, lazy
        self.vm = vm  # last: a thread that sees it sees the rest

    def lose(self) -> None:
        """Be empty again: the guest that was adopted has never run. Its machine is closed already."""
        with self.lock:
            self.vm = None
        self.console.end("the guest did not arrive")

    def here(self) -> Machine:
        """Return the machine.

        Raises:
            QmpError: it is still waited for.
        """
        if self.vm is None:
            raise QmpError("no guest is here yet", hint="it waits for one to be migrated in")
        return self.vm

    @property
    def running(self) -> bool:
        """Whether there is one and it runs."""
        return self.vm is not None and self.vm.status is VmStatus.RUNNING

    @property
    def being_read(self) -> bool:
        """Whether some of its memory is still in the file it is restored from."""
        return self.lazy is not None and not self.lazy.done

    @property
    def unreadable(self) -> bool:
        """Whether a page that is waited for cannot be read from that file."""
        return self.lazy is not None and self.lazy.failure is not None

    def read_ahead(self) -> None:
        """Begin to read what no vCPU waits for, too; after :meth:`Machine.resume`, for a failure pauses the guest."""
        if self.lazy is not None:
            self.lazy.read_ahead()

    def wait_for_pause(self) -> None:
        """Return when a failure to read, if there was one, has paused the guest, which it does on another thread.

        Who resumes the guest before that would see it paused after.
        """
        give_up_s = time.monotonic() + _PAUSE_PATIENCE_S  # for want of a thread it never comes
        while self.unreadable and self.running and time.monotonic() < give_up_s:
            time.sleep(_POLL_S)

    def read_again(self) -> None:
        """Try again to read what could not be read, if there is such a page."""
        if self.lazy is not None:
            self.lazy.retry()

    def stop_reading(self) -> None:
        """Give up what is still to be read, before :meth:`close`: the guest will not run again."""
        if self.lazy is not None and self.vm is not None:
            if self.lazy.failure is None:  # else it stands still
                self.vm.pause()
            self.lazy.close()

    def close(self) -> None:
        """Free the machine."""
        if self.vm is not None:
            self.vm.close()

    def _console_byte(self, data: bytes) -> None:
        self.console(data)
        self._on_console(data)
