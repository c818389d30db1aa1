"""Queries: what a client may ask of this process and its guest, without changing anything."""

from dataclasses import asdict
from typing import Any

from pageferry.core.cpu_features import model_of
from pageferry.core.cpuid import cpu_name
from pageferry.core.errors import GuestAt
from pageferry.core.vm import Vm, VmStatus
from pageferry.guests.abi import read_status
from pageferry.vmm.arguments import Arguments
from pageferry.vmm.guest import Guest
from pageferry.vmm.incoming import Incoming
from pageferry.vmm.outgoing import Outgoing
from pageferry.vmm.qmp import Handler
from pageferry.witness.cross_check import findings


class Queries:
    """The commands of the control socket that only look; they wait for nothing and take no lock.

    Args:
        guest: of this process.
        incoming: where it may come from.
        outgoing: where it may go.
    """

    def __init__(self, guest: Guest, incoming: Incoming, outgoing: Outgoing) -> None:
        self._guest = guest
        self._incoming = incoming
        self._outgoing = outgoing

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by command."""
        return {
            "query-status": self._query_status,
            "query-cpus-fast": self._query_cpus,
            "query-migrate": self._query_migrate,
            "x-query-guest": self._query_guest,
        }

    def run_state(self) -> str:
        """Return QEMU's word for what this process is doing."""
        vm = self._guest.vm
        if vm is None:
            return "inmigrate"
        if self._outgoing.guest_at is not GuestAt.SOURCE:
            return "postmigrate"
        if self._incoming.waits_for_source:
            return "paused"
        if vm.status is VmStatus.CRASHED:
            return "guest-panicked"
        if self._guest.unreadable:
            return "io-error"
        if vm.status is VmStatus.RUNNING and self._outgoing.holds_guest:
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
            for index, thread_id in enumerate(self._guest.here().vcpu_threads)
        ]

    def _query_migrate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        Arguments(arguments).done()
        info = self._outgoing.info()
        if "x-pageferry-report" in info:
            info["x-pageferry-report"]["oracle"] = findings(self._guest.here().log_dirty)
        return info

    def _query_guest(self, arguments: dict[str, Any]) -> dict[str, Any]:
        Arguments(arguments).done()
        vm, listening = self._guest.vm, self._incoming.listening
        result: dict[str, Any] = {
            "name": self._guest.name,
            "accel": self._guest.machines.accel,
            "accel_reason": self._guest.machines.reason,
            "silent_s": self._incoming.silent_s,
            "listening": None if listening is None else str(listening),
            "guest_at": None if vm is None else self._outgoing.guest_at,
            "console": self._guest.console.text(),
        }
        return result if vm is None else result | self._machine(vm)

    def _machine(self, vm: Vm) -> dict[str, Any]:
        lazy, host = self._guest.lazy, self._guest.machines.host_cpu
        return {
            "memory_bytes": vm.config.memory_bytes,
            "cpus": vm.config.cpus,
            "cpu": str(model_of(vm.cpuid)),
            "cpu_name": cpu_name(vm.cpuid),
            "host_cpu": None if host is None else asdict(host),
            "tracker": vm.log_dirty.tracker,
            "huge_pages": str(vm.memory.huge_pages),
            "huge_bytes": vm.memory.huge_bytes(),
            "unread_pages": None if lazy is None else lazy.missing_pages,
            "missing_pages": self._incoming.missing_pages,
            "unheard": self._incoming.unheard,
            "waits_for_source": self._incoming.waits_for_source,
            "work": self._work_done(vm),
            "exit_code": None if vm.end is None else vm.end.exit_code,
            "crash": None if vm.end is None else vm.end.crash,
            "oracle": findings(vm.log_dirty),
        }

    def _work_done(self, vm: Vm) -> list[int]:
        if self._incoming.missing_pages or self._guest.unreadable:
            return []  # to look might be to wait
        return [status.work for status in read_status(vm.memory, vm.config.cpus)]
