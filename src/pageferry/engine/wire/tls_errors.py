"""Turns OpenSSL's errors into one line, and a hint on what to do."""

import ssl

_CHECK_CA = "both ends need a certificate of the same CA: compare ca-cert.pem"
_RENEW = "make new certificates, or set the clock"
#: X509_V_ERR_*: what is wrong with a certificate, and what to do. Source: openssl/x509_vfy.h.
_VERIFY: dict[int, tuple[str, str]] = {
    9: ("is not valid yet", _RENEW),
    10: ("has expired", _RENEW),
    18: ("is signed by itself only", _CHECK_CA),
    19: ("is of another CA than ours", _CHECK_CA),
    20: ("is of another CA than ours", _CHECK_CA),
    21: ("is of another CA than ours", _CHECK_CA),
    7: ("is of another CA than ours", _CHECK_CA),
    26: ("is not for this end of a connection", "server-cert.pem is the destination's, client-cert.pem the source's"),
    62: ("is for another name", "--peer NAME says which name of it to accept"),
    64: ("is for another address", "--peer NAME says which name of it to accept"),
}
#: What the peer's alert says of our certificate.
_ALERTS: dict[str, tuple[str, str]] = {
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": ("it has expired, or is not valid yet", _RENEW),
    "TLSV1_ALERT_UNKNOWN_CA": ("it is of another CA than theirs", _CHECK_CA),
    "SSLV3_ALERT_BAD_CERTIFICATE": ("it is for another name, or not valid", "--peer there says which name it expects"),
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": ("there was none", "client-cert.pem and client-key.pem in --tls-dir"),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": ("it is not valid", _CHECK_CA),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": ("it is not for this end of a connection", _VERIFY[26][1]),
}
#: What each end finds where the other has another secret, and so another CA of the same name, or certificates.
_OTHER_CA = frozenset({7, 18, 19, 20, 21})
_OTHER_CA_ALERTS = frozenset({"TLSV1_ALERT_UNKNOWN_CA", "TLSV1_ALERT_DECRYPT_ERROR", "SSLV3_ALERT_BAD_CERTIFICATE"})
_THE_SECRET = "`pageferry receive --secret new` prints one for each migration: give the source that of this destination"
_NOT_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}
)
_TOO_OLD = frozenset({"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "VERSION_TOO_LOW"})


class TlsError(ConnectionError):
    """The two ends did not accept each other, or did not both speak TLS; ``hint`` says what to do."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class SecretContext(ssl.SSLContext):
    """The context of an end that has a secret; its certificates are no matter of the user's."""


def explained(error: ssl.SSLError, *, server_side: bool, by_secret: bool = False) -> OSError:
    """Return what ``error`` means.

    Args:
        error: of a handshake, or of a call after it: with TLS 1.3 a client hears only then that it was turned away.
        server_side: whether we are the destination.
        by_secret: whether we have a secret, and no files.
    """
    them = "source" if server_side else "destination"
    if by_secret and _is_of_another_ca(error):
        return TlsError(f"the secrets differ: the {them} does not have ours", _THE_SECRET)
    if isinstance(error, ssl.SSLCertVerificationError):
        what, hint = _VERIFY.get(error.verify_code, (f"is not valid: {error.verify_message}", _CHECK_CA))
        return TlsError(f"the {them}'s certificate {what}", hint)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return ConnectionResetError("the peer closed the connection")
    reason = error.reason or str(error)
    if reason in _ALERTS:
        what, hint = _ALERTS[reason]
        return TlsError(f"the {them} does not accept our certificate: {what}", hint)
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return TlsError("the source has no certificate", "client-cert.pem and client-key.pem in its --tls-dir")
    if reason in _TOO_OLD:
        return TlsError(f"the {them} does not speak TLS 1.3", "OpenSSL 1.1.1 or newer there")
    if reason in _NOT_TLS:
        hint = "pageferry receive tls:// there" if not server_side else "pageferry migrate to tls:// there"
        return TlsError(f"the {them} does not speak TLS", hint)
    return TlsError(f"TLS with the {them} failed: {reason.lower().replace('_', ' ')}")


def _is_of_another_ca(error: ssl.SSLError) -> bool:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_code in _OTHER_CA
    return error.reason in _OTHER_CA_ALERTS
