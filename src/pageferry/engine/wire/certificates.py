"""Certificates made here: a small authority, and what it issues.

It imports the library ``cryptography``, which need not be installed: :mod:`pageferry.engine.wire.credentials` imports
this module only when it has to. Nothing here is about whom to accept.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: Clocks of two hosts may differ by so much.
_SKEW = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A certificate and its private key, as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A certificate authority; it lasts as long as its certificates.

    Args:
        name: its own.
        days: how long it and what it issues is valid, from now on.
        seed: 32 secret bytes that its key is; None: a new one. Two authorities of one seed and name accept what either
            has issued.
        now: the time.
    """

    def __init__(
        self, name: str, *, days: int, seed: bytes | None = None, now: datetime.datetime | None = None
    ) -> None:
        self._name = name
        self._days = days
        self._now = now or datetime.datetime.now(datetime.UTC)
        self._key = Ed25519PrivateKey.generate() if seed is None else Ed25519PrivateKey.from_private_bytes(seed)
        self._issued = self._sign(self._name, self._key, names=(), usage=None)

    @property
    def issued(self) -> Issued:
        """Its own certificate, and the key."""
        return self._issued

    def issue(self, name: str, *, server: bool, names: Sequence[str] = ()) -> Issued:
        """Return a certificate for one end of a connection.

        Args:
            name: whose it is.
            server: for the end that listens; else for the one that connects.
            names: host names and addresses that it is for besides ``name``.
        """
        return self._sign(name, Ed25519PrivateKey.generate(), names=(name, *names), usage=server)

    def _sign(self, name: str, key: Ed25519PrivateKey, *, names: Sequence[str], usage: bool | None) -> Issued:
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - _SKEW)
            .not_valid_after(self._now + datetime.timedelta(days=self._days))
            .add_extension(x509.BasicConstraints(ca=usage is None, path_length=0 if usage is None else None), True)
            .add_extension(_key_usage(ca=usage is None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
        )
        if usage is not None:
            oid = ExtendedKeyUsageOID.SERVER_AUTH if usage else ExtendedKeyUsageOID.CLIENT_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([oid]), False)
            builder = builder.add_extension(x509.SubjectAlternativeName([_san(each) for each in names]), False)
        return Issued(
            certificate=builder.sign(self._key, None).public_bytes(serialization.Encoding.PEM),
            key=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
