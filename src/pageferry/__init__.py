"""pageferry: live migration of virtual machines under nested paging, with proof that nothing was lost.

For programs that run and move guests. A machine holds a guest; a guest moves from one machine to another, in one
process or between two, on one host or between two::

    from concurrent.futures import ThreadPoolExecutor

    import pageferry

    machines = pageferry.choose_machines()  # kvm where it works, else soft
    guest = pageferry.boot("kv", machines, memory_bytes=64 << 20)
    guest.resume()
    with ThreadPoolExecutor() as pool, pageferry.Acceptor("tcp://127.0.0.1:0") as acceptor:
        arrival = pool.submit(pageferry.receive, acceptor, machines)  # as a rule on another host
        report = pageferry.migrate(guest, acceptor.endpoint)
    print(f"{arrival.result().status}; it stood still for {report.downtime_s * 1e3:.0f} ms")

==============================  ========================================================================================
machines                        :func:`choose_machines` returns :class:`Machines`, the kind of machine; :class:`Accel`,
                                :class:`HugePages` and :class:`MachineModel` say which
guests                          :func:`boot` makes a :class:`Machine` with a guest in it; :class:`GuestParams` for a
                                workload, :class:`KernelOptions` for a kernel. ``resume()``, ``pause()``, ``close()``,
                                ``status`` (:class:`VmStatus`), ``end``, ``on_console()``, ``type_console()``
moving                          :func:`migrate` sends, to an :class:`Endpoint`; :func:`receive` takes in, at a
                                :class:`Acceptor`. :class:`MigrationOptions`, :class:`VerifyMode`, :class:`WireOptions`
                                and :class:`Packing` say how, :func:`make_policy` when to stop and copy; a
                                :class:`MigrationReport` tells how it went
moving, with more control       :class:`Source` and :class:`Destination`: cancel, hold, change limits, recover
files                           :func:`save`, :func:`restore`
errors                          :class:`PageferryError`, of which :class:`MigrationError` says where the guest is
                                (:class:`GuestAt`), :class:`UsageError` and :class:`UnsupportedError` what to change
==============================  ========================================================================================

A policy of your own needs ``pageferry.core.policy`` (docs/guide/policies.md), a tracker of your own
``pageferry.testing`` (docs/guide/trackers.md). Other modules are the implementation, and change without notice.

Importing this costs next to nothing: each name loads its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pageferry.core.version import __version__

if TYPE_CHECKING:
    from pageferry.api import boot, migrate, receive, restore, save
    from pageferry.core.errors import GuestAt, MigrationError, PageferryError, UnsupportedError, UsageError
    from pageferry.core.events import MigrationReport
    from pageferry.core.hugepages import HugePages
    from pageferry.core.machine import Machine
    from pageferry.core.policy_names import make_policy
    from pageferry.core.vm import MachineModel, VmStatus
    from pageferry.engine.destination import Destination
    from pageferry.engine.options import MigrationOptions, VerifyMode, WireOptions
    from pageferry.engine.source import Source
    from pageferry.engine.wire.acceptor import Acceptor
    from pageferry.engine.wire.channel import Endpoint
    from pageferry.guests.boot import GuestParams
    from pageferry.guests.loader import KernelOptions
    from pageferry.stream.packing import Packing
    from pageferry.vmm.accel import Accel, Machines, choose_machines

__all__ = [
    "Accel",
    "Acceptor",
    "Destination",
    "Endpoint",
    "GuestAt",
    "GuestParams",
    "HugePages",
    "KernelOptions",
    "Machine",
    "MachineModel",
    "Machines",
    "MigrationError",
    "MigrationOptions",
    "MigrationReport",
    "Packing",
    "PageferryError",
    "Source",
    "UnsupportedError",
    "UsageError",
    "VerifyMode",
    "VmStatus",
    "WireOptions",
    "__version__",
    "boot",
    "choose_machines",
    "make_policy",
    "migrate",
    "receive",
    "restore",
    "save",
]

#: Where each public name is.
_MODULES = {
    "core.errors": ("GuestAt", "MigrationError", "PageferryError", "UnsupportedError", "UsageError"),
    "core.events": ("MigrationReport",),
    "core.hugepages": ("HugePages",),
    "core.machine": ("Machine",),
    "core.policy_names": ("make_policy",),
    "core.vm": ("MachineModel", "VmStatus"),
    "engine.destination": ("Destination",),
    "engine.options": ("MigrationOptions", "VerifyMode", "WireOptions"),
    "engine.source": ("Source",),
    "engine.wire.channel": ("Endpoint",),
    "engine.wire.acceptor": ("Acceptor",),
    "guests.boot": ("GuestParams",),
    "guests.loader": ("KernelOptions",),
    "api": ("boot", "migrate", "receive", "restore", "save"),
    "stream.packing": ("Packing",),
    "vmm.accel": ("Accel", "Machines", "choose_machines"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401  # whatever the name is of
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
