"""LocalBackends: this host's disks and networks for a guest, where the user names them; else as at its source.

A source names its backends in the hello, and a peer that may run a guest here could so have any file of this process's
user opened. A source on this host is that user's or stronger; of one elsewhere each disk and network has to be named
here.
"""

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pageferry.core import paths
from pageferry.core.device_spec import DeviceKind, DeviceSpec, device_names
from pageferry.core.errors import UsageError

_NAMED = (DeviceKind.DISK, DeviceKind.NET)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalBackends:
    """Backends by the device's name (``disk0``, ``net1``), for the devices of a guest that arrives or is restored."""

    by_name: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, disks: Sequence[str], nets: Sequence[str]) -> "LocalBackends":
        """Return what ``NUMBER=PATH`` and ``NUMBER=tap:NAME`` say.

        Raises:
            UsageError: one says nothing of the kind.
        """
        by_name: dict[str, str] = {}
        for kind, texts in ((DeviceKind.DISK, disks), (DeviceKind.NET, nets)):
            for text in texts:
                number, _, backend = text.partition("=")
                if not number.isdecimal() or not backend:
                    raise UsageError(
                        f"not a {kind} here: {text!r}", hint=f"write --{kind} 0=..., for the guest's first"
                    )
                by_name[f"{kind}{int(number)}"] = absolute(kind, backend)
        return cls(by_name=by_name)

    def choose(self, specs: tuple[DeviceSpec, ...], *, trusted: bool) -> tuple[DeviceSpec, ...]:
        """Return a guest's devices with what stands behind them here.

        Args:
            specs: as the source or the file has them.
            trusted: whether its backends may be used here where none is named.

        Raises:
            UsageError: a backend is missing, is of another kind than the guest's, or is for a device that it has not.
        """
        names = device_names(specs)
        for name in self.by_name:
            if name not in names:
                raise UsageError(f"the guest has no {name}", hint=f"it has {', '.join(names) or 'no devices'}")
        return tuple(self._choose(name, spec, trusted=trusted) for name, spec in zip(names, specs, strict=True))

    def _choose(self, name: str, spec: DeviceSpec, *, trusted: bool) -> DeviceSpec:
        backend = self.by_name.get(name)
        if backend is None:
            if spec.kind in _NAMED and not trusted:
                raise UsageError(
                    f"{name} of the guest is {spec.backend} at its source, and nothing says what it is here",
                    hint=f"at the destination: pageferry receive --{spec.kind} {name.removeprefix(spec.kind)}=...",
                )
            return spec
        if spec.kind == DeviceKind.NET and _sort(backend) != _sort(spec.backend):
            raise UsageError(
                f"{name} of the guest is a {_sort(spec.backend)} at its source and would be a {_sort(backend)} here",
                hint="what a network leaves to the guest differs between the two",
            )
        return replace(spec, backend=backend)


AS_AT_THE_SOURCE = LocalBackends()
"""Nothing is said here."""


def absolute(kind: str, backend: str) -> str:
    """Return a backend as it means the same in every directory."""
    if kind == DeviceKind.DISK:
        return str(paths.absolute(backend))
    sort, _, path = backend.partition(":")
    return f"unix:{paths.absolute(path)}" if sort == "unix" and path else backend


def is_local(connection: socket.socket) -> bool:
    """Tell whether the other end of an accepted connection is on this host."""
    if connection.family == socket.AF_UNIX:
        return True
    ends = (connection.getsockname(), connection.getpeername())
    ours, theirs = (_ip(address) for address, *_ in ends)
    return theirs.is_loopback or ours == theirs


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address; of an IPv4 connection to an IPv6 socket, the IPv4 address."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def _sort(backend: str) -> str:
    return backend.partition(":")[0]
