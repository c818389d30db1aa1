"""GuestProcess: one guest, or the wait for one, behind a QMP control socket.

It owns the Vm, runs at most one migration at a time on a thread of its own, and translates between QMP's words (as
QEMU uses them) and the engine's. The run states are QEMU's: ``running``, ``paused``, ``inmigrate`` (waiting for a
guest), ``finish-migrate`` (the stop-and-copy), ``postmigrate`` (the guest has left), ``shutdown``, ``guest-panicked``,
``io-error`` (a page cannot be read from the file that the guest is restored from).
"""

import base64
import binascii
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pageferry.core.cpuid import cpu_name, model_of
from pageferry.core.errors import GuestAt, MigrationError, PageferryError, UsageError, VmError
from pageferry.core.events import (
    Event,
    Phase,
    PhaseBegan,
    PostcopyPaused,
    PostcopyProgress,
    PostcopyRecovered,
    RoundEnded,
    RoundProgress,
)
from pageferry.core.policy import Policy
from pageferry.core.policy_names import make_policy
from pageferry.core.vm import Vm, VmConfig, VmStatus
from pageferry.engine.attempt import HELD, Attempt
from pageferry.engine.destination import Destination
from pageferry.engine.lazy import LazyRestore
from pageferry.engine.prove import VerifyMode
from pageferry.engine.restore import restore, restore_lazily
from pageferry.engine.save import Save
from pageferry.engine.saved_guest import SavedGuest
from pageferry.engine.source import Source
from pageferry.engine.transport import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S, Channel, Endpoint, accept_within
from pageferry.engine.wire import WireOptions
from pageferry.guests.abi import read_status
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.elf import Program
from pageferry.stream.packing import Packing
from pageferry.testing.cross_check import CrossCheck
from pageferry.vmm.accel import Machines
from pageferry.vmm.arguments import Arguments, saved_to
from pageferry.vmm.console import ConsoleFollower, ConsoleTail
from pageferry.vmm.migrate_info import migrate_info
from pageferry.vmm.qmp import QmpError, QmpServer
from pageferry.vmm.work_meter import WorkMeter

_log = logging.getLogger(__name__)
_PROGRESS_INTERVAL_S = 0.05
_POLL_S = 0.05
_RECOVER_HINT = "at the source: pageferry migrate --recover"
#: Why a migration that has committed is not cancelled, by where the guest is.
_TOO_LATE = {
    GuestAt.SOURCE: "the guest is being handed over",
    GuestAt.UNKNOWN: "whether the guest has switched is not known",
    GuestAt.DESTINATION: "the guest has switched, and its pages follow",
}

#: The event that carries the engine's own events, for progress; ``type`` is the event's class name.
ENGINE_EVENT = "X_PAGEFERRY_MIGRATION"


def _packing(name: str) -> Packing:
    try:
        return Packing(name)
    except ValueError:
        raise QmpError(f"Invalid parameter 'x-compress', expected: {', '.join(Packing)}") from None


class GuestProcess:
    """The life of a guest process.

    Args:
        machines: the kind of machine to make.
        control: path of the QMP socket, or None for no control.
        on_console: sees the guest's console output.
        on_message: sees one line for a person when something happens.
    """

    def __init__(
        self,
        machines: Machines,
        control: Path | None,
        *,
        on_console: Callable[[bytes], None],
        on_message: Callable[[str], None],
    ) -> None:
        self._machines = machines
        self._on_console = on_console
        self._say = on_message
        self._lock = threading.Lock()
        self._vm: Vm | None = None
        self._name = "incoming"
        self._console = ConsoleTail()
        self._work = WorkMeter()
        self._source: Attempt | None = None
        self._lazy: LazyRestore | None = None
        self._migration: threading.Thread | None = None
        self._announced_stop = False
        self._announced_status = ""
        self._next_progress_s = 0.0
        self._incoming: Destination | None = None
        self._dropped: set[str] = set()
        self._receiver: threading.Thread | None = None
        self._endpoint: Endpoint | None = None
        self._listener: socket.socket | None = None
        self._booted = False
        self._quit = False
        subscriptions = {"x-console-follow": self._console_follow}
        self._server = None if control is None else QmpServer(control, self._commands(), subscriptions)

    # -- life ------------------------------------------------------------------------------------------------------

    def boot(self, program: Program, config: VmConfig, params: GuestParams) -> None:
        """Make a machine and load a program into it; it does not run yet.

        Raises:
            PageferryError: the machine, the memory or the program are not possible; nothing is left behind.
        """
        vm = self._machines.make_vm(config)
        try:
            boot(vm, program, params=params)
        except BaseException:
            vm.close()
            raise
        self._adopt(vm, program.name)
        self._booted = True

    def restore(self, saved: SavedGuest, on_progress: Callable[[int, int], None]) -> None:
        """Make the machine of a guest in a file and fill it; it does not run yet.

        Raises:
            PageferryError: no machine here can hold it, or the file cannot be read; nothing is left behind.
        """
        self._adopt(restore(saved, self._machines.make_vm, on_progress=on_progress), saved.path.stem)
        self._booted = True

    def restore_lazily(self, saved: SavedGuest) -> None:
        """As :meth:`restore`, but its memory is read when it is touched, and in any case; the file is closed then.

        Raises:
            UnsupportedError: this host cannot wait for pages.
            PageferryError: as for :meth:`restore`.
        """
        vm, self._lazy = restore_lazily(saved, self._machines.make_vm, on_failure=self._restore_stopped)
        self._adopt(vm, saved.path.stem)
        self._booted = True

    def _restore_stopped(self, error: PageferryError) -> None:
        """A page that somebody waits for cannot be read: the guest stands still until somebody resumes it."""
        self._say(f"{error}; the guest is paused: put it right, then pageferry resume")
        self._event("STOP")
        self._guest().pause()

    def start(self) -> None:
        """Serve the control socket and let the guest run, if there is one."""
        if self._server is not None:
            self._server.start()
        if self._booted and self._vm is not None:
            self._vm.resume()

    def listen(self, endpoint: Endpoint) -> Endpoint:
        """Wait for a guest at ``endpoint`` on a thread; return the address, with the port that it really has.

        Raises:
            UsageError: the address is in use or not ours.
        """
        try:
            listener = endpoint.listen()
        except OSError as error:
            hint = "choose another port, or end what listens there"
            raise UsageError(f"cannot listen at {endpoint}: {error.strerror or error}", hint=hint) from error
        self._listener = listener
        self._endpoint = endpoint.bound(listener)
        self._receiver = threading.Thread(target=self._receive_main, name="receive", daemon=True)
        self._receiver.start()
        return self._endpoint

    def wait(self) -> int:
        """Wait until the guest ends here or somebody says quit; return the process's exit code.

        0: quit, or the guest ended with code 0; 8: it ended with another code; 9: it crashed.
        """
        while not self._quit:
            time.sleep(_POLL_S)
            vm = self._vm
            if vm is None or self._is_migrating():
                continue
            if vm.end is not None:
                return self._guest_ended(vm)
            if (self._lazy is None or self._lazy.done) and not self._missing_pages():  # to look might be to wait
                self._work.sample(vm)
        return 0

    def quit(self) -> None:
        """End the process's work; from any thread, also a signal handler's."""
        self._quit = True  # a plain store: a signal handler may not take a lock that its own thread holds

    def close(self) -> None:
        """End a migration, free the machine, remove the sockets."""
        if self._source is not None:
            self._source.abandon()
        incoming = self._incoming
        if incoming is not None and self._vm is not None and self._vm.end is not None:
            incoming.release()
        self._stop_listening()
        if incoming is not None:
            incoming.abort()
        if self._receiver is not None:
            self._receiver.join()
        if self._migration is not None:
            self._migration.join()
        self._console.end("the guest process has ended")
        self._give_up_restore()
        if self._server is not None:
            self._server.close()
        if self._vm is not None:
            self._vm.close()

    def _give_up_restore(self) -> None:
        if self._lazy is not None and self._vm is not None:
            if self._lazy.failure is None:  # else it stands still
                self._vm.pause()
            self._lazy.close()

    def _guest_ended(self, vm: Vm) -> int:
        end = vm.end
        if end is None:
            raise VmError("the guest has not ended")
        if end.crash is not None:
            self._event("GUEST_PANICKED", {"action": "shutdown", "x-reason": end.crash})
            self._console.end(f"the guest crashed: {end.crash}")
            self._say(f"the guest crashed: {end.crash}")
            return 9
        self._event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
        self._console.end(f"the guest ended with exit code {end.exit_code}")
        self._say(f"the guest ended with exit code {end.exit_code}")
        return 8 if end.exit_code else 0

    def _adopt(self, vm: Vm, name: str) -> None:
        vm.on_console(self._console_byte)
        self._vm, self._name = vm, name

    def _console_byte(self, data: bytes) -> None:
        self._console(data)
        self._on_console(data)

    def _event(self, name: str, data: dict[str, Any] | None = None) -> None:
        if self._server is not None:
            self._server.event(name, data)

    # -- receiving -------------------------------------------------------------------------------------------------

    def _receive_main(self) -> None:
        listener = self._listener
        while listener is not None and not self._quit:
            try:
                sock, _ = listener.accept()
            except OSError:
                if self._listener is None:
                    return  # stopped listening
                time.sleep(_POLL_S)  # out of descriptors, or a source that left at once
                continue
            try:
                self._receive(sock)
            except Exception:
                _log.exception("an attempt to receive a guest ended by a defect")
            if self._vm is not None:
                self._stop_listening()
                return

    def _receive(self, sock: socket.socket) -> None:
        channel = Channel(sock, DEFAULT_TIMEOUT_S)
        self._incoming = Destination(
            channel,
            self._machines.make_vm,
            accel=self._machines.accel,
            accept=self._accept_more,
            dropped=self._dropped,
            on_event=self._on_incoming_event,
            before_run=self._arrived,
        )
        self._event("MIGRATION", {"status": "active"})
        try:
            self._arrive(self._incoming)
        finally:
            self._incoming = None

    def _arrive(self, incoming: Destination) -> None:
        try:
            vm = incoming.run()
        except PageferryError as error:
            self._event("MIGRATION", {"status": "failed"})
            if isinstance(error, MigrationError) and error.guest_at is GuestAt.DESTINATION:
                self._say(f"the guest is lost: {error}")
                return
            self._vm = None
            self._console.end("the guest did not arrive")
            self._say(f"no guest received: {error}; waiting for another attempt")
            return
        self._event("MIGRATION", {"status": "completed"})
        if vm.status is VmStatus.RUNNING:
            self._event("RESUME")
        self._say("a guest has arrived and is ours")
        incoming.see_off()

    def _accept_more(self, wait_s: float) -> Channel | None:
        listener = self._listener
        if listener is None:
            raise ConnectionAbortedError("no longer listening")
        return accept_within(listener, wait_s, DEFAULT_TIMEOUT_S)

    def _arrived(self, vm: Vm, name: str) -> None:
        with self._lock:
            self._adopt(vm, name)

    def _on_incoming_event(self, event: Event) -> None:
        self._announce_postcopy(event)
        if isinstance(event, PostcopyPaused):
            self._say(f"{event.reason}; the guest stands still until its source comes back ({_RECOVER_HINT})")
            self._event("STOP")
        elif isinstance(event, PostcopyRecovered):
            self._say("the source is back, and the guest runs on")
            self._event("RESUME")
        self._event(ENGINE_EVENT, {"type": type(event).__name__, **asdict(event)})

    def _announce_postcopy(self, event: Event) -> None:
        if isinstance(event, PostcopyRecovered) or (isinstance(event, PhaseBegan) and event.phase is Phase.POSTCOPY):
            self._event("MIGRATION", {"status": "postcopy-active"})
        elif isinstance(event, PostcopyPaused):
            self._event("MIGRATION", {"status": "postcopy-paused"})

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            try:
                listener.shutdown(socket.SHUT_RDWR)
            except OSError:
                _log.debug("the listener was closed already")
            listener.close()
            if self._endpoint is not None:
                self._endpoint.remove()

    # -- migrating -------------------------------------------------------------------------------------------------

    def _is_migrating(self) -> bool:
        thread_lives = self._migration is not None and self._migration.is_alive()
        return thread_lives and self._source is not None and self._source.report is None

    def _recover(self, endpoint: Endpoint) -> None:
        if self._source is None or not self._source.recover(endpoint):
            raise QmpError("no migration here was cut after the switch", hint="start one without --recover")

    def _migrate(self, arguments: dict[str, Any]) -> None:
        args = Arguments(arguments)
        uri = args.text("uri")
        if args.flag("resume"):
            args.done()
            self._recover(Endpoint.parse(uri))
            return
        file = saved_to(uri)
        make = self._moving(args, Endpoint.parse(uri)) if file is None else self._saving(args, file)
        args.done()
        with self._lock:
            vm = self._guest()
            if self._is_migrating():
                raise QmpError("There's a migration process in progress")
            if self._lazy is not None and not self._lazy.done:
                hint = "try again later; status tells how much is left"
                raise QmpError("the guest's memory is still being read from its file", hint=hint)
            self._check_here()
            if self._missing_pages():
                raise QmpError("pages of the guest are still coming from its source", hint="try again later")
            self._source = make(vm)
            self._work.forget()
            self._announced_stop = False
            self._migration = threading.Thread(target=self._migrate_main, args=(self._source,), name="migrate")
            self._migration.daemon = True
            self._event("MIGRATION", {"status": "setup"})
            self._migration.start()

    def _moving(self, args: Arguments, endpoint: Endpoint) -> Callable[[Vm], Attempt]:
        policy = _policy(args)
        verify = args.choice("x-verify", VerifyMode)
        timeout_s = min(args.number("x-timeout-s") or DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S)
        wire = WireOptions(
            bandwidth_bytes_per_s=args.integer("x-bandwidth"),
            connections=args.integer("x-connections") or 1,
            compress=_packing(args.text("x-compress", Packing.NONE)),
            delta_cache_bytes=args.integer("x-delta-cache") or 0,
        )
        hold = args.flag("x-hold")
        return lambda vm: Source(
            vm,
            endpoint,
            policy,
            name=self._name,
            timeout_s=timeout_s,
            verify=verify,
            wire=wire,
            hold=hold,
            on_event=self._on_engine_event,
            work_before=self._work.oldest(),
        )

    def _saving(self, args: Arguments, file: Path) -> Callable[[Vm], Attempt]:
        policy = _policy(args)
        stop = args.flag("x-stop")
        wire = WireOptions(bandwidth_bytes_per_s=args.integer("x-bandwidth"))
        return lambda vm: Save(
            vm,
            file,
            policy,
            stop=stop,
            bandwidth_bytes_per_s=wire.bandwidth_bytes_per_s,
            on_event=self._on_engine_event,
            work_before=self._work.oldest(),
        )

    def _migrate_main(self, source: Attempt) -> None:
        try:
            report = source.run()
        except MigrationError as error:
            status = source.report.status if source.report is not None else "failed"
            self._event("MIGRATION", {"status": status})
            if self._announced_stop and error.guest_at is GuestAt.SOURCE and self._is_running():
                self._event("RESUME")
            self._work.forget()
            self._say(f"migration {status}: {error}")
            return
        except Exception:
            _log.exception("a migration ended by a defect")
            self._event("MIGRATION", {"status": "failed"})
            return
        if report.guest_at is GuestAt.DESTINATION:
            with self._lock:  # who follows later is refused
                self._console.end(self._where_it_went())
        self._event("MIGRATION", {"status": "completed"})
        what = "moved" if report.file is None else f"been saved to {report.file}"
        down = "" if report.downtime_s is None else f", {report.downtime_s * 1e3:.1f} ms down"
        self._say(f"the guest has {what}: {report.total_s:.2f} s in total{down}")

    def _on_engine_event(self, event: Event) -> None:
        self._announce_postcopy(event)
        if isinstance(event, PostcopyPaused):
            where = "the guest stands still there and needs pages that are here"
            if self._guest_at() is GuestAt.UNKNOWN:
                where = "whether the guest runs there is not known; if it does, it needs pages that are here"
            self._say(f"{event.reason}; {where} ({_RECOVER_HINT})")
        begins = Phase.PRECOPY if isinstance(self._source, Save) else Phase.HELLO
        if isinstance(event, PhaseBegan) and event.phase is begins:
            self._event("MIGRATION", {"status": "active"})
        if isinstance(event, PhaseBegan) and event.phase is Phase.PAUSE and self._is_running():
            self._announced_stop = True
            self._event("STOP")
        if isinstance(event, PhaseBegan) and event.phase is Phase.HANDOFF:
            self._announce_snapshot()
        if isinstance(event, RoundEnded):
            self._event("MIGRATION_PASS", {"pass": event.stats.index + 1})
            self._announce_status()
        if isinstance(event, RoundProgress | PostcopyProgress):
            now_s = time.monotonic()
            if now_s < self._next_progress_s:
                return
            self._next_progress_s = now_s + _PROGRESS_INTERVAL_S
        data = {"type": type(event).__name__, **asdict(event)}
        if isinstance(event, RoundProgress | PostcopyProgress) and self._source is not None:
            outlook = self._source.outlook()
            data |= {"eta_s": outlook.eta_s, "eta_reason": outlook.eta_reason}
        self._event(ENGINE_EVENT, data)

    def _announce_status(self) -> None:
        status = "" if self._source is None else self._source.status
        if status != self._announced_status and HELD in (status, self._announced_status):
            self._event("MIGRATION", {"status": status})
        self._announced_status = status

    def _migrating(self) -> Attempt:
        if self._source is None or not self._is_migrating():
            raise QmpError("there is no migration in progress")
        return self._source

    def _migrate_set_parameters(self, arguments: dict[str, Any]) -> None:
        args = Arguments(arguments)
        limit_ms = args.number("downtime-limit")
        bandwidth = args.count("max-bandwidth")
        given = {
            "downtime_limit_s": None if limit_ms is None else limit_ms / 1e3,
            "max_rounds": args.integer("x-max-rounds"),
            "deadline_s": args.number("x-deadline-s"),
        }
        args.done()
        wire = None if bandwidth is None else WireOptions(bandwidth_bytes_per_s=bandwidth or None)
        self._migrating().change_limits({name: value for name, value in given.items() if value is not None}, wire)

    def _migrate_continue(self, arguments: dict[str, Any]) -> None:
        args = Arguments(arguments)
        state = args.text("state", HELD)
        args.done()
        source = self._migrating()
        if state != HELD or source.status not in (HELD, "active"):
            raise QmpError(f"the migration is not in state {state!r} but {source.status!r}")
        source.go_on()

    def _announce_snapshot(self) -> None:
        """Tell that the guest runs on, if it does, while the file that holds it now is finished."""
        if self._announced_stop and self._source is not None and not self._source.frozen and self._is_running():
            self._announced_stop = False
            self._event("RESUME")

    def _query_migrate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        Arguments(arguments).done()
        if self._source is None:
            return {}
        info = migrate_info(self._source)
        if "x-pageferry-report" in info:
            info["x-pageferry-report"]["oracle"] = self._oracle()
        return info

    # -- commands --------------------------------------------------------------------------------------------------

    def _commands(self) -> dict[str, Callable[[dict[str, Any]], Any]]:
        return {
            "query-status": self._query_status,
            "query-cpus-fast": self._query_cpus,
            "stop": self._stop,
            "cont": self._cont,
            "migrate": self._migrate,
            "query-migrate": self._query_migrate,
            "migrate_cancel": self._migrate_cancel,
            "migrate-set-parameters": self._migrate_set_parameters,
            "migrate-continue": self._migrate_continue,
            "quit": self._quit_command,
            "x-query-guest": self._query_guest,
            "x-console-write": self._console_write,
        }

    def _guest(self) -> Vm:
        if self._vm is None:
            raise QmpError("no guest is here yet", hint="it waits for one to be migrated in")
        return self._vm

    def _is_running(self) -> bool:
        return self._vm is not None and self._vm.status is VmStatus.RUNNING

    def _guest_at(self) -> GuestAt:
        source = self._source
        return GuestAt.SOURCE if source is None else source.guest_at

    def _check_here(self) -> None:
        at = self._guest_at()
        self._check_not_moved()
        if at is GuestAt.UNKNOWN:
            hint = "see whether the destination runs it; if it surely does not: pageferry resume --force"
            if self._is_migrating():
                hint = f"pageferry migrate --recover finds out; {hint}"
            raise QmpError("whether the guest has moved is not known", hint=hint)
        if self._is_migrating() and self._source is not None and self._source.handing_over:
            raise QmpError("the guest is being handed over")

    def _check_not_moved(self) -> None:
        if self._guest_at() is GuestAt.DESTINATION:
            hint = "if nobody restored it: pageferry resume --force" if isinstance(self._source, Save) else ""
            raise QmpError(self._where_it_went(), hint=hint)

    def _where_it_went(self) -> str:
        if isinstance(self._source, Save):
            return f"the guest was saved to {self._source.path} and stopped here; restore it from there"
        return "the guest has moved to another process; attach to it there"

    def _may_be_here(self) -> bool:
        """Whether a guest that left may be taken back by somebody who knows that it runs nowhere else."""
        at = self._guest_at()
        return at is GuestAt.UNKNOWN or (at is GuestAt.DESTINATION and isinstance(self._source, Save))

    def run_state(self) -> str:
        """Return QEMU's word for what this process is doing."""
        vm = self._vm
        if vm is None:
            return "inmigrate"
        if self._guest_at() is not GuestAt.SOURCE:
            return "postmigrate"
        if self._waits_for_source():
            return "paused"
        if vm.status is VmStatus.CRASHED:
            return "guest-panicked"
        if self._lazy is not None and self._lazy.failure is not None:
            return "io-error"
        if vm.status is VmStatus.RUNNING and self._source is not None and self._source.frozen:
            return "finish-migrate"
        return str(vm.status)

    def _query_status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        Arguments(arguments).done()
        state = self.run_state()
        return {"status": state, "running": state == "running", "singlestep": False}

    def _query_cpus(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        Arguments(arguments).done()
        return [
            {"cpu-index": index, "qom-path": f"/machine/cpu[{index}]", "target": "x86_64", "thread-id": thread_id}
            for index, thread_id in enumerate(self._guest().vcpu_threads)
        ]

    def _stop(self, arguments: dict[str, Any]) -> None:
        Arguments(arguments).done()
        with self._lock:
            vm = self._guest()
            self._check_here()
            if self._waits_for_source():
                raise QmpError("the guest stands still until its source comes back", hint=_RECOVER_HINT)
            if vm.status is VmStatus.RUNNING:
                vm.pause()
                self._work.forget()
                self._event("STOP")

    def _cont(self, arguments: dict[str, Any]) -> None:
        args = Arguments(arguments)
        force = args.flag("x-force")
        args.done()
        if self._lazy is not None:
            self._lazy.retry()  # before the lock: whoever holds it may wait for a page
        with self._lock:
            vm = self._guest()
            if force and self._source is not None and self._may_be_here():
                self._source.take_back()
            self._check_here()
            if vm.status is not VmStatus.RUNNING:
                vm.resume()
            if self._lazy is not None:
                self._lazy.retry()  # what failed again meanwhile paused the guest before it was resumed
            self._event("RESUME")

    def _migrate_cancel(self, arguments: dict[str, Any]) -> None:
        Arguments(arguments).done()
        if self._source is not None and self._is_migrating() and not self._source.cancel():
            raise QmpError(f"too late to cancel: {_TOO_LATE[self._guest_at()]}")

    def _waits_for_source(self) -> bool:
        incoming = self._incoming
        return incoming is not None and incoming.waits_for_source

    def _missing_pages(self) -> int:
        incoming = self._incoming
        return 0 if incoming is None else incoming.missing_pages

    def _quit_command(self, arguments: dict[str, Any]) -> None:
        Arguments(arguments).done()
        if self._source is not None and self._source.keeps_pages:
            hint = "wait until they have gone; end the process by a signal only if the guest may be lost"
            raise QmpError("the guest needs pages at the destination that are here only", hint=hint)
        self._event("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self.quit()

    def _console_follow(self, arguments: dict[str, Any], wake: Callable[[], None]) -> ConsoleFollower:
        Arguments(arguments).done()
        with self._lock:
            self._guest()
            self._check_not_moved()
            return self._console.follow(wake)

    def _console_write(self, arguments: dict[str, Any]) -> dict[str, int]:
        args = Arguments(arguments)
        text = args.text("data")
        args.done()
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise QmpError("Invalid parameter 'data', expected: base64") from error
        self._check_not_moved()
        return {"taken": self._guest().type_console(data)}

    def _work_done(self, vm: Vm) -> list[int]:
        if self._missing_pages() or (self._lazy is not None and self._lazy.failure is not None):
            return []  # to look might be to wait
        return [status.work for status in read_status(vm.memory, vm.config.cpus)]

    def _query_guest(self, arguments: dict[str, Any]) -> dict[str, Any]:
        Arguments(arguments).done()
        result: dict[str, Any] = {
            "name": self._name,
            "accel": self._machines.accel,
            "accel_reason": self._machines.reason,
            "listening": None if self._listener is None else str(self._endpoint),
            "guest_at": None if self._vm is None else self._guest_at(),
            "console": self._console.text(),
        }
        vm = self._vm
        if vm is not None:
            result |= {
                "memory_bytes": vm.config.memory_bytes,
                "cpus": vm.config.cpus,
                "cpu": str(model_of(vm.cpuid)),
                "cpu_name": cpu_name(vm.cpuid),
                "tracker": vm.log_dirty.tracker,
                "huge_pages": str(vm.memory.huge_pages),
                "huge_bytes": vm.memory.huge_bytes(),
                "unread_pages": None if self._lazy is None else self._lazy.left_pages,
                "missing_pages": self._missing_pages(),
                "waits_for_source": self._waits_for_source(),
                "work": self._work_done(vm),
                "exit_code": None if vm.end is None else vm.end.exit_code,
                "crash": None if vm.end is None else vm.end.crash,
                "oracle": self._oracle(),
            }
        return result

    def _oracle(self) -> dict[str, Any] | None:
        log = None if self._vm is None else self._vm.log_dirty
        return {"trackers": log.tracker, **asdict(log.counts())} if isinstance(log, CrossCheck) else None


def _policy(args: Arguments) -> Policy:
    return make_policy(
        args.text("x-policy", "downtime"),
        downtime_limit_s=args.number("x-downtime-limit-s"),
        max_rounds=args.integer("x-max-rounds"),
        deadline_s=args.number("x-deadline-s"),
    )
