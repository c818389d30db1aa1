"""Addresses as people write them, what they stand for, and the sockets that listen there.

Both ends of a migration resolve a name alike: a destination listens at every address of it that is this host's, and a
source tries them all.

Source: RFC 3986, section 3.2; RFC 4007, section 11 (zones); Linux ``unix(7)``, ``ipv6(7)``.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import re
import select
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_MAX_PORT = 65_535
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_ANY_IPV6 = "::"
#: The address is not this host's, or the kernel has no such family: another of the same name may do.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_SOCKET_MODE = 0o600
_UCRED = struct.Struct("iII")  # pid_t, uid_t, gid_t


def parse_host_port(text: str) -> tuple[str, int]:
    """Return the host and the port of ``HOST:PORT``; an IPv6 address is in brackets, with its zone if it has one.

    Raises:
        ValueError: something else, or something more; says what.
    """
    for character in text:
        if character in "/?#@\\" or character.isspace() or not character.isprintable():
            raise ValueError(f"{character!r} cannot be in it")
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > _MAX_PORT:
        raise ValueError(f"it must end with a port, from 0 to {_MAX_PORT}")
    if host.startswith("["):
        if not host.endswith("]"):
            raise ValueError("a bracket is not closed before the port")
        return _ipv6(host[1:-1]), int(port)
    if ":" in host:
        raise ValueError("an IPv6 address must be in brackets")
    expect_host_name(host)
    return host, int(port)


def expect_host_name(name: str) -> None:
    """Check that a host may be called so, or that it is an IPv4 address.

    Raises:
        ValueError: it may not.
    """
    try:
        encoded = name.encode("idna").decode()
    except UnicodeError as error:
        raise ValueError(f"{name!r} cannot be a host's name") from error
    if not _NAME.fullmatch(encoded):
        raise ValueError(f"{name!r} cannot be a host's name" if name else "the host is missing")


def _ipv6(text: str) -> str:
    address, percent, zone = text.partition("%")
    try:
        is_link_local = ipaddress.IPv6Address(address).is_link_local
    except ipaddress.AddressValueError as error:
        raise ValueError(f"{address!r} is not an IPv6 address") from error
    if is_link_local and not zone:
        raise ValueError(f"a link-local address needs its interface, as in [{address}%eth0]")
    if percent and not is_link_local:
        raise ValueError(f"only a link-local address has an interface, and {address} is none")
    return text


def resolve(host: str, port: int) -> list[tuple[int, Any]]:
    """Return what ``host`` stands for, in the order to try: pairs of family and address, without repeats.

    Raises:
        OSError: it is not known, or its interface does not exist.
    """
    zone = host.partition("%")[2]
    if zone and not zone.isdecimal():
        try:
            socket.if_nametoindex(zone)
        except OSError as error:
            raise OSError(errno.ENODEV, f"there is no network interface {zone}") from error
    # Python's IDNA takes milliseconds to load, and is for other names only.
    name = host.encode() if host.isascii() else host
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))


class Listener:
    """Sockets that listen for the same thing; a context manager.

    A Unix socket takes connections of this process's own user and of root only.

    Args:
        sockets: at least one; they are this object's from now on.
        path: of a Unix socket.
    """

    def __init__(self, sockets: Sequence[socket.socket], path: Path | None = None) -> None:
        self._sockets = list(sockets)
        self._file = None if path is None else (path, os.lstat(path))
        for sock in self._sockets:
            sock.setblocking(False)  # a connection may be gone when its turn comes

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._sockets[0].getsockname()[1])

    def accept(self) -> socket.socket:
        """Return the next connection, blocking.

        Raises:
            OSError: it was shut down, or descriptors are short.
        """
        while (sock := self.accept_within(None)) is None:
            pass
        return sock

    def accept_within(self, wait_s: float | None) -> socket.socket | None:
        """Return the next connection, blocking; None when there was none within ``wait_s``, or it was not let in.

        Raises:
            OSError: it was shut down, or descriptors are short.
        """
        poll = select.poll()
        by_fd = {sock.fileno(): sock for sock in self._sockets}
        if -1 in by_fd:
            raise OSError(errno.EBADF, "the listener was closed")
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(None if wait_s is None else wait_s * 1e3):
            try:
                sock, _ = by_fd[fd].accept()
            except BlockingIOError:
                continue
            if sock.family != socket.AF_UNIX or _is_ours(sock):
                return sock
            sock.close()
        return None

    def shutdown(self) -> None:
        """Wake those who wait in :meth:`accept` with an error; from any thread."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, and remove the path if it is still ours. May be called twice."""
        if self._file is not None:
            path, ours = self._file
            self._file = None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), ours):  # before the socket is closed, which keeps its inode
                    path.unlink()
        for sock in self._sockets:
            sock.close()


def _give_owner_rights(path: Path) -> None:
    """Give a socket's owner the rights that a umask has taken; whatever is at ``path`` is not followed."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) != _SOCKET_MODE and stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.chmod(f"/proc/self/fd/{fd}", _SOCKET_MODE)
    finally:
        os.close(fd)


def _is_ours(sock: socket.socket) -> bool:
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid in (0, os.geteuid()):
        return True
    _log.warning("a connection of user %d was refused", uid)
    return False


def listen_tcp(host: str, port: int, backlog: int = 1) -> Listener:
    """Listen at every address of ``host`` that is here; ``::`` is every address of both families.

    Port 0 takes a free one, the same for all.

    Raises:
        OSError: an address is in use, or none is ours.
    """
    sockets: list[socket.socket] = []
    failure: OSError = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    try:
        for family, address in resolve(host, port):
            if sockets and not port:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_bound_tcp(family, address, backlog))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                failure = error
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    if not sockets:
        raise failure
    return Listener(sockets)


def _bound_tcp(family: int, address: Any, backlog: int) -> socket.socket:  # noqa: ANN401  # the family's own form
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != _ANY_IPV6)
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unix(path: Path, backlog: int = 1) -> Listener:
    """Listen on a Unix socket of mode 0600; a path left behind by a process that was killed is taken over.

    Raises:
        OSError: the path cannot be used, or a living process serves it.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                if probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED:
                    path.unlink()
        # The name is made with the socket's own mode less the umask, so others can connect at no moment.
        os.fchmod(sock.fileno(), _SOCKET_MODE)
        sock.bind(os.fspath(path))
        _give_owner_rights(path)
        sock.listen(backlog)
        return Listener([sock], path)
    except BaseException:
        sock.close()
        raise
