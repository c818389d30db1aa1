"""Hints on errors of the operating system, by number: one line for a person, or ""."""

import errno
import grp
import os
import pwd
import socket
import stat
from pathlib import Path

#: What this process or host has run out of.
_RESOURCES = {
    errno.EMFILE: "this process may open no more files: raise ulimit -n",
    errno.ENFILE: "this host may open no more files: raise sysctl fs.file-max",
    errno.ENOMEM: "this host has no memory left for it: free some",
    errno.ENOBUFS: "this host has no memory left for sockets: free some",
    errno.EAGAIN: "this user may have no more processes, threads or locked memory: raise ulimit -u and -l",
    errno.ENOSPC: "the file system is full: make room there, or choose another",
    errno.EDQUOT: "the user's quota is used up: make room, or choose another file system",
}
_FILE = {
    errno.ENOENT: "no such file or folder: check the name",
    errno.ENOTDIR: "a part of its path is not a folder: check the name",
    errno.EISDIR: "it is a folder: give a file in it",
    errno.EACCES: "this user may not: change the permissions, or choose another place",
    errno.EPERM: "this user may not, or the file cannot be changed: choose another place",
    errno.EROFS: "the file system is read-only: choose another",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ELOOP: "a symbolic link in its path leads back to itself",
    errno.EFBIG: "a file may not be so long there: see ulimit -f, or choose another file system",
    errno.EIO: "the disk failed: see dmesg",
    errno.ESTALE: "the server of that file system has lost it: mount it again",
}
_LISTEN = {
    errno.EADDRINUSE: "choose another port, or end what listens there",
    errno.EADDRNOTAVAIL: "this host does not have that address: ip address shows those it has",
    errno.EAFNOSUPPORT: "this host has no such family of addresses",
    errno.EACCES: "this user may not listen there: ports below 1024 are for root",
    errno.ENODEV: "ip link shows the interfaces",
}
_LISTEN_UNIX = _FILE | {errno.EADDRINUSE: "another process serves it, or a file has this name: choose another path"}
_CONNECT = {
    errno.ECONNREFUSED: "nothing listens there: is pageferry receive running, and is the port right?",
    errno.ETIMEDOUT: "nothing answers there: check the address, and firewalls on the way",
    errno.EHOSTUNREACH: "no way leads to that host: check the address and the routes",
    errno.ENETUNREACH: "no way leads to that network: check the address and the routes",
    errno.EADDRNOTAVAIL: "nothing can be reached from here by that address",
    errno.ENODEV: "ip link shows the interfaces",
}
_CONNECT_UNIX = _FILE | {
    errno.ENOENT: "nothing listens there: is pageferry receive running, and is the path right?",
    errno.ECONNREFUSED: "nothing listens there any more: is pageferry receive running?",
    errno.EACCES: "this user may not connect to it: use the user whose socket it is",
}
#: What the kernel has room for in a sockaddr_un, less the NUL.
MAX_SOCKET_PATH_BYTES = 107
_TOO_LONG = f"the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes: choose a shorter one"
_NAME_UNKNOWN = "the name is not known: check it, or give an address"


def is_resource(error: OSError) -> bool:
    """Tell whether a process or its host has run out of something."""
    return error.errno in _RESOURCES and not isinstance(error, BlockingIOError)


def resource_hint(error: OSError) -> str:
    """Return what to do about an error that may come anywhere."""
    return _RESOURCES.get(error.errno or 0, "")


def file_hint(error: OSError) -> str:
    """Return what to do about a file that cannot be opened, read or written."""
    return _FILE.get(error.errno or 0, "") or resource_hint(error)


def listen_hint(error: OSError, *, path: str = "") -> str:
    """Return what to do where nothing can listen; ``path``: of a Unix socket."""
    return _socket_hint(error, _LISTEN_UNIX if path else _LISTEN, path)


def connect_hint(error: OSError, *, path: str = "") -> str:
    """Return what to do where nothing can connect to; ``path``: of a Unix socket."""
    return _socket_hint(error, _CONNECT_UNIX if path else _CONNECT, path)


def _socket_hint(error: OSError, hints: dict[int, str], path: str) -> str:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        return _TOO_LONG
    if isinstance(error, socket.gaierror):
        return _NAME_UNKNOWN
    return hints.get(error.errno or 0, "") or resource_hint(error)


def owner_of(path: Path) -> str:
    """Return the name, or the number, of the user who owns a file; "" if that is not known."""
    try:
        uid = os.stat(path).st_uid
    except OSError:
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def device_hint(path: Path, group: str) -> str:
    """Return what to do about a device that this user may not open, as it is now.

    Args:
        path: the device.
        group: whose members usually may.
    """
    status = os.stat(path)
    for_group = stat.S_IMODE(status.st_mode) & 0o060 == 0o060
    if for_group and status.st_gid:
        return f"join its group ({_join(_group(status.st_gid))})"
    give = f"sudo chgrp {group} {path}; sudo chmod 660 {path}"
    return f"only {owner_of(path)} may open it: {give}; {_join(group)}"


def _join(group: str) -> str:
    return f"sudo usermod -aG {group} $USER, then log in again"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
