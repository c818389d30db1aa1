"""GuestProcess: one guest, or the wait for one, behind a QMP control socket.

Here is the life of the process, from boot, restore or the wait to its end. Where the guest comes from over the wire is
:mod:`pageferry.vmm.incoming`, where it goes :mod:`pageferry.vmm.outgoing`; what is there of it is
:mod:`pageferry.vmm.guest`. :mod:`pageferry.vmm.qmp_commands` and :mod:`pageferry.vmm.queries` translate between QMP's
words (as QEMU uses them) and these.

The run states are QEMU's: ``running``, ``paused``, ``inmigrate`` (waiting for a guest), ``finish-migrate`` (the
stop-and-copy), ``postmigrate`` (the guest has left), ``shutdown``, ``guest-panicked``, ``io-error`` (a page cannot be
read from the file that the guest is restored from).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pageferry.core.errors import PageferryError
from pageferry.core.machine import Machine
from pageferry.core.policy_names import NO_USERS_POLICIES, UsersPolicies
from pageferry.core.vm import GuestEnd, VmConfig
from pageferry.engine.image.lazy import LazyRestore
from pageferry.engine.image.restore import restore, restore_lazily
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.guests.loader import Loader
from pageferry.vmm.accel import Machines
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.guest import Guest
from pageferry.vmm.incoming import Incoming
from pageferry.vmm.local_backends import AS_AT_THE_SOURCE, LocalBackends
from pageferry.vmm.outgoing import Outgoing
from pageferry.vmm.qmp import QmpServer
from pageferry.vmm.qmp_commands import Commands
from pageferry.vmm.queries import Queries

_POLL_S = 0.05


class GuestProcess:
    """The life of a guest process. One thread calls all of it but ``quit``, ``run_state`` and ``type_console``.

    Args:
        machines: the kind of machine to make.
        control: path of the QMP socket, or None for no control.
        backends: what stands behind the devices of a guest that arrives or is restored.
        users_policies: may decide for a migration from here, besides the built-in ones.
        on_console: sees the guest's console output.
        on_message: sees one line for a person when something happens.
    """

    def __init__(
        self,
        machines: Machines,
        control: Path | None,
        *,
        backends: LocalBackends = AS_AT_THE_SOURCE,
        users_policies: UsersPolicies = NO_USERS_POLICIES,
        on_console: Callable[[bytes], None],
        on_message: Callable[[str], None],
    ) -> None:
        self._backends = backends
        self._announcer = Announcer(on_message, machines.warning)
        self._guest = Guest(machines, on_console)
        self.incoming = Incoming(self._guest, self._backends, self._announcer)
        """The wait for a guest, once it is told to listen; ended by :meth:`close`."""
        self._outgoing = Outgoing(self._guest, self._announcer)
        self._queries = Queries(self._guest, self.incoming, self._outgoing)
        self._server = None if control is None else self._make_server(control, users_policies)
        self._made: Machine | None = None  # here, by boot or restore, to be started; one that arrives starts by itself
        self._quit = False

    def _make_server(self, control: Path, users_policies: UsersPolicies) -> QmpServer:
        commands = Commands(
            self._guest, self.incoming, self._outgoing, self._announcer, users_policies, quit_process=self.quit
        )
        server = QmpServer(control, self._queries.handlers() | commands.handlers(), commands.subscriptions())
        self._announcer.tell_clients_of(server)
        return server

    def boot(self, loader: Loader, config: VmConfig) -> None:
        """Make a machine and load a guest into it; it does not run yet.

        Raises:
            PageferryError: the machine, the memory or the guest are not possible; nothing is left behind.
        """
        self._adopt(loader.make(self._guest.make_vm, config), loader.name)

    def restore(self, saved: SavedGuest, on_progress: Callable[[int, int], None]) -> None:
        """Make the machine of a guest in a file and fill it; it does not run yet.

        Raises:
            PageferryError: no machine here can hold it, or the file cannot be read; nothing is left behind.
        """
        self._adopt(restore(saved, self._make_restored, on_progress=on_progress), saved.path.stem)

    def restore_lazily(self, saved: SavedGuest) -> None:
        """As :meth:`restore`, but its memory is read when it is touched, and once it runs in any case.

        The file is closed when all of it was read.

        Raises:
            UnsupportedError: this host cannot wait for pages.
            PageferryError: as for :meth:`restore`.
        """
        vm, lazy = restore_lazily(saved, self._make_restored, on_failure=self._restore_stopped)
        self._adopt(vm, saved.path.stem, lazy)

    def _make_restored(self, config: VmConfig) -> Machine:
        return self._guest.make_vm(replace(config, devices=self._backends.choose(config.devices, trusted=True)))

    def _adopt(self, vm: Machine, name: str, lazy: LazyRestore | None = None) -> None:
        self._guest.adopt(vm, name, lazy)
        self._made = vm

    def _restore_stopped(self, error: PageferryError) -> None:
        """A page that is waited for cannot be read: the guest stands still until it is resumed."""
        self._announcer.say(f"{error}; the guest is paused: put it right, then pageferry resume")
        self._announcer.event("STOP")
        self._guest.here().pause()

    def start(self, *, paused: bool = False) -> None:
        """Serve the control socket; run the guest if it was booted or restored here, unless ``paused``."""
        if self._server is not None:
            self._server.start()
        if self._made is not None:
            if not paused:
                self._made.resume()
            self._guest.read_ahead()

    def wait(self) -> GuestEnd | None:
        """Wait until the guest ends here or the process is told to quit; return how it ended, None if it did not."""
        while not self._quit:
            time.sleep(_POLL_S)
            vm = self._guest.vm
            if vm is None or self._outgoing.under_way:
                continue
            if vm.end is not None:
                self._guest_ended(vm.end)
                return vm.end
            if not self._guest.being_read and not self.incoming.missing_pages:  # to look might be to wait
                self._guest.work.sample(vm)
        return None

    def quit(self) -> None:
        """End the process's work; from any thread, also a signal handler's."""
        self._quit = True  # a plain store: a signal handler may not take a lock that its own thread holds
        self.incoming.begin_no_more()

    def type_console(self, data: bytes) -> int:
        """Give the guest console input; return how many of its bytes were taken: none while it is not here."""
        vm = self._guest.vm
        return 0 if vm is None else vm.type_console(data)

    def run_state(self) -> str:
        """Return QEMU's word for what this process is doing; from any thread."""
        return self._queries.run_state()

    def close(self) -> None:
        """End a migration, free the machine, remove the sockets."""
        self._outgoing.abandon()
        self.incoming.close()
        self._outgoing.join()
        if self._server is not None:
            self._outgoing.wait_until_told(self._server)
        self._guest.console.end("the guest process has ended")
        self._guest.stop_reading()
        if self._server is not None:
            self._server.close()
        self._guest.close()

    def _guest_ended(self, end: GuestEnd) -> None:
        if end.crash is not None:
            self._announcer.event("GUEST_PANICKED", {"action": "shutdown", "x-reason": end.crash})
            why = f"the guest crashed: {end.crash}"
        else:
            reason = "guest-reset" if end.reset else "guest-shutdown"
            self._announcer.event("SHUTDOWN", {"guest": True, "reason": reason})
            why = f"the guest {'asked to be started anew' if end.reset else f'ended with exit code {end.exit_code}'}"
        self._guest.console.end(why)
        self._announcer.say(why)
