"""Credentials: how one end of a migration shows who it is over TLS, and whom it accepts.

Both ends always verify. They have certificates of one authority (:meth:`Credentials.from_dir`), with the file names
that QEMU and libvirt use; or both know one secret (:meth:`Credentials.from_secret`), from which each makes the same
authority, for this migration alone, and has it issue a certificate of its own. The protocol is TLS 1.3 in either case.
"""

import base64
import binascii
import contextlib
import ipaddress
import os
import secrets
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pageferry.core.errors import UnsupportedError, UsageError
from pageferry.engine.wire.listener import expect_host_name
from pageferry.engine.wire.tls_errors import SecretContext
from pageferry.stream.ferry_order import Side

if TYPE_CHECKING:
    from pageferry.engine.wire.certificates import Authority, Issued

CA_CERT = "ca-cert.pem"
#: The files of each end: certificate and key.
FILES = {Side.SOURCE: ("client-cert.pem", "client-key.pem"), Side.DESTINATION: ("server-cert.pem", "server-key.pem")}

_SECRET_PREFIX = "pageferry-secret-1."
_SECRET_BYTES = 32
_SECRET_HINT = "`pageferry receive --secret new` prints one"
_SECRET_DAYS = 30
#: What the authority of a secret is called, and the two ends.
_AUTHORITY = "pageferry one-time secret"
_ENDS = {Side.SOURCE: "source.pageferry.invalid", Side.DESTINATION: "destination.pageferry.invalid"}
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Credentials:
    """Of one end; shared by all connections of a migration.

    Args:
        context: verifies the peer, and has our certificate.
        peer: a name or address that the peer's certificate must have; None, for a source: the host that it connects to.
    """

    def __init__(self, context: ssl.SSLContext, peer: str | None) -> None:
        self.context = context
        self.peer = peer

    @classmethod
    def from_dir(cls, directory: Path, side: Side, peer: str | None) -> "Credentials":
        """Return the credentials of ``side`` from files in ``directory``.

        Raises:
            UsageError: a file is missing or cannot be read or used, a key can be read by others, ``peer`` cannot be a
                host's name, or a destination does not say whom it accepts.
        """
        if peer is not None:
            _expect_peer_name(peer)
        if side is Side.DESTINATION and peer is None:
            raise UsageError(
                "with --tls-dir a destination says whom it accepts", hint="--peer NAME: a name in client-cert.pem there"
            )
        certificate, key = FILES[side]
        for name in (CA_CERT, certificate, key):
            _expect_readable(directory / name)
        _expect_private(directory / key)
        context = _context(side)
        try:
            context.load_verify_locations(directory / CA_CERT)
        except ssl.SSLError as error:
            raise UsageError(f"{directory / CA_CERT} is not a certificate", hint="it is PEM") from error
        try:
            context.load_cert_chain(directory / certificate, directory / key)
        except ssl.SSLError as error:
            what = f"{directory / certificate} and {key} cannot be used: {_reason(error)}"
            raise UsageError(
                what, hint="a certificate and its own private key, without a passphrase, in PEM"
            ) from error
        return cls(context, peer)

    @classmethod
    def from_secret(cls, secret: str, side: Side) -> "Credentials":
        """Return the credentials of ``side`` for a peer that knows ``secret``, as :func:`new_secret` returns it.

        Raises:
            UsageError: it is not a secret.
            UnsupportedError: the library for certificates is missing.
        """
        authority = new_authority(_AUTHORITY, days=_SECRET_DAYS, seed=_seed_of(secret))
        context = _context(side, SecretContext)
        context.load_verify_locations(cadata=authority.issued.certificate.decode("ascii"))
        _load(context, authority.issue(_ENDS[side], server=side is Side.DESTINATION))
        return cls(context, _ENDS[side.other])

    def accepts(self, certificate: Mapping[str, Any]) -> bool:
        """Tell whether a certificate, which was verified already, is for the name that we expect."""
        return self.peer is None or any(_same(name, self.peer) for name in names_of(certificate))


def _expect_peer_name(peer: str) -> None:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(peer)
        return
    try:
        expect_host_name(peer)
    except ValueError as error:
        raise UsageError(
            f"no peer to expect: {error}", hint="--peer: a name or an address in its certificate"
        ) from error


def new_authority(name: str, *, days: int, seed: bytes | None = None) -> "Authority":
    """Return an :class:`~pageferry.engine.wire.certificates.Authority`, if certificates can be made here.

    Raises:
        UnsupportedError: the library for it is missing.
    """
    try:
        from pageferry.engine.wire.certificates import Authority
    except ImportError as error:
        raise UnsupportedError(
            "cryptography",
            "certificates cannot be made here: the library cryptography is missing",
            hint="pip install 'pageferry[tls]'",
        ) from error
    return Authority(name, days=days, seed=seed)


def names_of(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names and addresses that a certificate is for, as :meth:`ssl.SSLSocket.getpeercert` tells them."""
    return tuple(str(name) for kind, name in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address"))


def new_secret() -> str:
    """Return a new secret for one migration, as printable text."""
    seed = base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).decode("ascii")
    return _SECRET_PREFIX + seed.rstrip("=")


def read_secret(path: Path) -> str:
    """Return the secret in a file.

    Raises:
        UsageError: it cannot be read, or others can read it, or it is not a secret.
    """
    _expect_readable(path, _SECRET_HINT)
    _expect_private(path)
    try:
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} holds no secret", hint=_SECRET_HINT) from error
    _seed_of(secret)
    return secret


def _seed_of(secret: str) -> bytes:
    try:
        if not secret.startswith(_SECRET_PREFIX):
            raise ValueError("it begins otherwise")
        seed = base64.b64decode(secret.removeprefix(_SECRET_PREFIX) + "=", altchars=b"-_", validate=True)
        if len(seed) != _SECRET_BYTES:
            raise ValueError("it has another length")
    except (ValueError, binascii.Error) as error:
        raise UsageError("this is not a secret", hint=_SECRET_HINT) from error
    return seed


def _context(side: Side, kind: type[ssl.SSLContext] = ssl.SSLContext) -> ssl.SSLContext:
    client = side is Side.SOURCE
    context = kind(ssl.PROTOCOL_TLS_CLIENT if client else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = client
    context.hostname_checks_common_name = False
    if not client:
        context.num_tickets = 0  # no session is resumed
    return context


def _load(context: ssl.SSLContext, issued: "Issued") -> None:
    # The standard library reads a key from a file only; this one is memory, and gone when it is closed.
    fd = os.memfd_create("pageferry-key", os.MFD_CLOEXEC)
    try:
        os.write(fd, issued.key + issued.certificate)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _expect_readable(path: Path, hint: str = "`pageferry keys` makes what a lab needs") -> None:
    """Check that there is such a file; ``hint``: where one comes from."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe might be to wait
            raise UsageError(f"{path} is not a regular file", hint=hint)
        path.open("rb").close()
    except FileNotFoundError as error:
        raise UsageError(f"there is no {path}", hint=hint) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="it must be this user's") from error


def _expect_private(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OTHERS:
        raise UsageError(f"{path} can be read or changed by others (mode {mode:04o})", hint=f"chmod 600 {path}")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


def _same(name: str, expected: str) -> bool:
    try:
        return ipaddress.ip_address(name) == ipaddress.ip_address(expected)
    except ValueError:
        return name.lower() == expected.lower()
