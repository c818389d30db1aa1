"""What a peer that is not pageferry seems to be, for an error that helps."""

_KNOWN_PEERS: tuple[tuple[bytes, str], ...] = (
    (b"\xff" * 8, "a bare libxc stream"),
    (b'{"QMP"', "a QMP control socket"),
    (b"{", "a JSON protocol (QMP perhaps)"),
    (b"QEVM", "a QEMU migration stream"),
    (b"HTTP/", "an HTTP server"),
    (b"GET ", "an HTTP client"),
    (b"POST ", "an HTTP client"),
    (b"HEAD ", "an HTTP client"),
    (b"PUT ", "an HTTP client"),
    (b"CONNECT ", "an HTTP client"),
    (b"OPTIONS ", "an HTTP client"),
    (b"SSH-", "an SSH peer"),
    (b"RFB ", "a VNC server"),
    (b"220", "an SMTP or FTP server"),
    (b"-ERR", "a Redis server"),
    (b"\x16\x03", "a TLS peer"),
    (b"\x15\x03", "a TLS peer"),
    (b"LibvirtQ", "a libvirt save image"),
)


def what_it_looks_like(first_bytes: bytes) -> str:
    """Return what a peer that is not pageferry seems to be, by the first bytes it sent; always a few words."""
    head = first_bytes[:8]
    for start, name in _KNOWN_PEERS:
        if head and (head.startswith(start) or (len(head) >= 3 and start.startswith(head))):
            return name
    return f"something that begins with {head!r}"
