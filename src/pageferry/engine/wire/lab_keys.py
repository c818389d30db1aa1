"""The files of a small CA and of two ends, for a lab."""

import os
import secrets
from pathlib import Path

from pageferry.core.errors import UsageError
from pageferry.core.os_hints import file_hint
from pageferry.engine.wire.credentials import CA_CERT, FILES, new_authority
from pageferry.stream.ferry_order import Side

_CA_KEY = "ca-key.pem"


def make_keys(directory: Path, *, source: str, destination: str, days: int) -> dict[str, Path]:
    """Make certificates of a new authority; return the directories: of ``ca``, ``source`` and ``destination``.

    Each end's directory is its ``--tls-dir``. The authority's key is in neither.

    Args:
        directory: where to; it must not be there yet, or be empty.
        source: a name or an address of the source.
        destination: the same of the destination.
        days: how long they are valid.

    Raises:
        UsageError: the directory cannot be made or is in use.
        UnsupportedError: the library that makes certificates is missing.
    """
    authority = new_authority(f"pageferry lab {secrets.token_hex(4)}", days=days)
    made = {"ca": directory / "ca"}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UsageError(f"{directory} is not empty", hint="name a new directory")
        made["ca"].mkdir(mode=0o700)
        _write(made["ca"] / CA_CERT, authority.issued.certificate)
        _write(made["ca"] / _CA_KEY, authority.issued.key)
        for side, name in ((Side.SOURCE, source), (Side.DESTINATION, destination)):
            issued = authority.issue(name, server=side is Side.DESTINATION)
            made[str(side)] = directory / side
            made[str(side)].mkdir(mode=0o700)
            certificate, key = FILES[side]
            _write(made[str(side)] / CA_CERT, authority.issued.certificate)
            _write(made[str(side)] / certificate, issued.certificate)
            _write(made[str(side)] / key, issued.key)
    except OSError as error:
        what = f"{error.filename or directory} cannot be made: {error.strerror}"
        raise UsageError(what, hint=file_hint(error)) from error
    return made


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
