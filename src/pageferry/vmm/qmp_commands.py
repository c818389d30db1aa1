"""QMP's commands: what a client may tell this process and its guest to do."""

import base64
import binascii
from collections.abc import Callable
from typing import Any

from pageferry.core.policy_names import UsersPolicies
from pageferry.core.vm import VmStatus
from pageferry.engine.job import JobStatus
from pageferry.engine.wire.channel import Endpoint
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.arguments import Arguments, saved_to
from pageferry.vmm.attempts import DEFAULT_POLICY, asked_for
from pageferry.vmm.console import ConsoleFollower
from pageferry.vmm.guest import Guest
from pageferry.vmm.incoming import RECOVER_HINT, Incoming
from pageferry.vmm.outgoing import Outgoing
from pageferry.vmm.parameters import Parameters, limits_of_policy
from pageferry.vmm.qmp import Handler, Subscribe
from pageferry.vmm.qmp_error import QmpError


class Commands:
    """The commands of the control socket that change something; the words and their meaning are QEMU's.

    Whatever depends on the guest's being here looks for that, and is done, under the guest's lock.

    Args:
        guest: of this process.
        incoming: where it may come from.
        outgoing: where it may go.
        announcer: hears what was done.
        users_policies: may decide for a migration here, besides the built-in ones.
        quit_process: ends the process's work.
    """

    def __init__(
        self,
        guest: Guest,
        incoming: Incoming,
        outgoing: Outgoing,
        announcer: Announcer,
        users_policies: UsersPolicies,
        quit_process: Callable[[], None],
    ) -> None:
        self._guest = guest
        self._incoming = incoming
        self._outgoing = outgoing
        self._announcer = announcer
        self._users_policies = users_policies
        self._quit_process = quit_process
        self._parameters = Parameters()

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by command."""
        return {
            "stop": self._stop,
            "cont": self._cont,
            "migrate": self._migrate,
            "migrate_cancel": self._migrate_cancel,
            "migrate-set-parameters": self._migrate_set_parameters,
            "migrate-set-capabilities": self._migrate_set_capabilities,
            "query-migrate-parameters": self._query_migrate_parameters,
            "query-migrate-capabilities": self._query_migrate_capabilities,
            "migrate-continue": self._migrate_continue,
            "quit": self._quit,
            "system_powerdown": self._power_down,
            "x-console-write": self._console_write,
        }

    def subscriptions(self) -> dict[str, Subscribe]:
        """Return what a client can follow, by command."""
        return {"x-console-follow": self._console_follow}

    def _stop(self, arguments: dict[str, Any]) -> None:
        Arguments(arguments).done()
        with self._guest.lock:
            vm = self._guest.here()
            self._outgoing.check_here()
            if self._incoming.waits_for_source:
                raise QmpError("the guest stands still until its source comes back", hint=RECOVER_HINT)
            if vm.status is VmStatus.RUNNING:
                vm.pause()
                self._guest.work.forget()
                self._announcer.event("STOP")

    def _cont(self, arguments: dict[str, Any]) -> None:
        args = Arguments(arguments)
        force = args.flag("x-force")
        args.done()
        self._guest.wait_for_pause()
        self._guest.read_again()  # before the lock: its holder may wait for a page
        with self._guest.lock:
            vm = self._guest.here()
            if force:
                self._outgoing.take_back()
            self._outgoing.check_here()
            self._outgoing.go_on_here()
            if vm.status is not VmStatus.RUNNING:
                vm.resume()
            self._guest.read_again()  # what failed again meanwhile paused the guest before it was resumed
            self._announcer.event("RESUME")

    def _migrate(self, arguments: dict[str, Any]) -> None:
        args = Arguments(arguments)
        uri = args.text("uri")
        args.flag("detach")  # as in QEMU: it never waits
        if args.flag("resume"):
            args.done()
            self._outgoing.recover(Endpoint.parse(uri))
            return
        policy = args.peek("x-policy") or DEFAULT_POLICY
        args.fill_in(self._parameters.kept_for(policy, saves=saved_to(uri) is not None))
        make = asked_for(uri, args, self._users_policies)
        with self._guest.lock:
            self._guest.here()
            if self._guest.being_read:
                hint = "try again later; status tells how much is left"
                raise QmpError("the guest's memory is still being read from its file", hint=hint)
            if self._incoming.missing_pages:
                raise QmpError("pages of the guest are still coming from its source", hint="try again later")
            self._outgoing.begin(make)

    def _migrate_cancel(self, arguments: dict[str, Any]) -> None:
        Arguments(arguments).done()
        self._outgoing.cancel()

    def _migrate_set_parameters(self, arguments: dict[str, Any]) -> None:
        args = Arguments(arguments)
        given, wire = self._parameters.take(args)
        args.done()
        if self._outgoing.under_way:
            self._outgoing.change_limits(limits_of_policy(given), wire)
        self._parameters.keep(given, wire)

    def _migrate_set_capabilities(self, arguments: dict[str, Any]) -> None:
        self._parameters.set_capabilities(Arguments(arguments))

    def _query_migrate_parameters(self, arguments: dict[str, Any]) -> dict[str, Any]:
        Arguments(arguments).done()
        return self._parameters.told()

    def _query_migrate_capabilities(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        Arguments(arguments).done()
        return self._parameters.capabilities()

    def _migrate_continue(self, arguments: dict[str, Any]) -> None:
        args = Arguments(arguments)
        state = args.text("state", JobStatus.HELD)
        args.done()
        self._outgoing.go_on(state)

    def _quit(self, arguments: dict[str, Any]) -> None:
        Arguments(arguments).done()
        if self._outgoing.keeps_pages:
            hint = "wait until they have gone; end the process by a signal only if the guest may be lost"
            raise QmpError("the guest needs pages at the destination that are here only", hint=hint)
        if self._incoming.missing_pages:
            hint = "wait until they have come; end the process by a signal only if the guest may be lost"
            raise QmpError("the guest needs pages that are still at its source", hint=hint)
        if self._outgoing.under_way:
            hint = "pageferry cancel ends it first; a signal to the process ends the guest as well"
            raise QmpError("There's a migration process in progress", hint=hint)
        self._announcer.event("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self._quit_process()

    def _power_down(self, arguments: dict[str, Any]) -> None:
        Arguments(arguments).done()
        with self._guest.lock:
            vm = self._guest.here()
            self._outgoing.check_here()
            vm.press_power_button()
            self._announcer.event("POWERDOWN")

    def _console_follow(self, arguments: dict[str, Any], wake: Callable[[], None]) -> ConsoleFollower:
        Arguments(arguments).done()
        with self._guest.lock:
            self._guest.here()
            self._outgoing.check_not_moved()
            return self._guest.console.follow(wake)

    def _console_write(self, arguments: dict[str, Any]) -> dict[str, int]:
        args = Arguments(arguments)
        text = args.text("data")
        args.done()
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise QmpError("Invalid parameter 'data', expected: base64") from error
        self._outgoing.check_not_moved()
        return {"taken": self._guest.here().type_console(data)}
