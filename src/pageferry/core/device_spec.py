"""DeviceSpec: the virtio devices of a PC's guest, and how a hello and a file describe them."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

MAX_DEVICES = 31
"""As many as a PCI bus has slots besides the host bridge's."""
DIRECT = ",direct"
"""Suffix of the backend of a disk that is used past the host's page cache."""
_MAX_TEXT_CHARS = 1024
_MAX_BYTES = 1 << 63


class DeviceKind(StrEnum):
    """The kinds of virtio devices that a PC may have."""

    DISK = "disk"
    NET = "net"
    CONSOLE = "console"
    RNG = "rng"
    BALLOON = "balloon"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One virtio device of a PC. The guest sees all of it but ``backend``, and keeps it for life.

    ``kind``: a :class:`DeviceKind`, or one that this release does not know. ``backend``: what stands behind it on this
    host: a disk's file, ``PATH`` or ``PATH,direct``; ``tap:NAME`` or ``unix:PATH`` for a net; empty for the others.
    ``readonly``: of a disk. ``size_bytes``: of a disk; 0: what the file has. ``mac``: of a net, six bytes in
    hexadecimal with colons.
    """

    kind: str
    backend: str = ""
    readonly: bool = False
    size_bytes: int = 0
    mac: str = ""


#: Key, among the devices of a machine, of the state that has a guest's list of virtio devices.
SPECS_NAME = "virtio"


def encode_specs(specs: tuple[DeviceSpec, ...]) -> bytes:
    """Return the devices as a state, JSON; :func:`decode_specs` reads it."""
    return json.dumps([asdict(spec) for spec in specs], separators=(",", ":")).encode("ascii")


def decode_specs(data: bytes) -> tuple[DeviceSpec, ...]:
    """Return the devices in such a state.

    Raises:
        ValueError: it is not such a state.
    """
    try:
        return specs_from_json(json.loads(data.decode("utf-8")))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


_FITS: dict[str, Callable[[Any], bool]] = {
    "readonly": lambda value: type(value) is bool,
    "size_bytes": lambda value: type(value) is int and 0 <= value < _MAX_BYTES,
}


def _is_text(value: object) -> bool:
    return type(value) is str and len(value) <= _MAX_TEXT_CHARS and value.isprintable()


def specs_from_json(value: object) -> tuple[DeviceSpec, ...]:
    """Return the devices in a JSON value from elsewhere; fields that are not known are ignored.

    Raises:
        ValueError: it is not a list of devices, or a field is missing or not what it must be.
    """
    if type(value) is not list or len(value) > MAX_DEVICES:
        raise ValueError(f"no list of at most {MAX_DEVICES} devices")
    return tuple(_spec(item) for item in value)


def _spec(item: object) -> DeviceSpec:
    fields: dict[str, Any] = item if type(item) is dict else {}
    known: dict[str, Any] = {name: fields.get(name) for name in DeviceSpec.__slots__}
    for name, value in known.items():
        if not _FITS.get(name, _is_text)(value):
            raise ValueError(f"a device whose {name} is {value!r:.80}")
    return DeviceSpec(**known)


def device_names(specs: tuple[DeviceSpec, ...]) -> tuple[str, ...]:
    """Return what each device is called: its kind, and its number among those of the kind."""
    kinds = [spec.kind for spec in specs]
    return tuple(f"{kind}{kinds[:at].count(kind)}" for at, kind in enumerate(kinds))
