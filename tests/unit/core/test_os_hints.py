"""What is advised fits what the operating system said."""

import errno
import os
import pwd
import socket

import pytest

from pageferry.core.os_hints import (
    connect_hint,
    device_hint,
    file_hint,
    is_resource,
    listen_hint,
    owner_of,
    resource_hint,
)

FILE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EFBIG)


def of(code):
    return OSError(code, os.strerror(code))


def test_each_error_of_a_file_has_a_hint_of_its_own():
    assert len({file_hint(of(code)) for code in FILE}) == len(FILE)
    assert all(file_hint(of(code)) for code in FILE)
    assert "room" not in file_hint(of(errno.EROFS))
    assert "room" in file_hint(of(errno.ENOSPC))
    assert file_hint(of(errno.EXDEV)) == ""


@pytest.mark.parametrize(
    ("hint", "code", "path", "says"),
    [
        (listen_hint, errno.EADDRINUSE, "", "another port"),
        (listen_hint, errno.EADDRINUSE, "/x", "another path"),
        (listen_hint, errno.EACCES, "", "1024"),
        (listen_hint, errno.EACCES, "/x", "permissions"),
        (listen_hint, errno.ENOENT, "/none/x", "no such file or folder"),
        (listen_hint, errno.EADDRNOTAVAIL, "", "this host does not have that address"),
        (listen_hint, errno.EMFILE, "", "ulimit -n"),
        (connect_hint, errno.ECONNREFUSED, "", "port right"),
        (connect_hint, errno.ECONNREFUSED, "/x", "any more"),
        (connect_hint, errno.ENOENT, "/x", "path right"),
        (connect_hint, errno.EACCES, "/x", "user whose socket"),
        (connect_hint, errno.EHOSTUNREACH, "", "routes"),
        (connect_hint, errno.ETIMEDOUT, "", "firewalls"),
        (connect_hint, errno.EMFILE, "/x", "ulimit -n"),
    ],
)
def test_a_socket_s_hint_fits_its_kind(hint, code, path, says):
    assert says in hint(of(code), path=path)


def test_a_path_that_no_socket_can_have_is_said_to_be_too_long():
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="too long") as error:
        sock.bind("/" + "x" * 107)
    for hint in (listen_hint, connect_hint):
        assert "at most 107 bytes" in hint(error.value, path="/" + "x" * 107)
        assert "at most 107" not in hint(of(errno.ENOENT), path="/" + "x" * 106)


def test_a_name_that_is_not_known_is_said_to_be():
    assert "name is not known" in connect_hint(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))


def test_what_a_host_has_run_out_of_is_known_as_such():
    for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC):
        assert is_resource(of(code))
        assert resource_hint(of(code))
    for code in (errno.ECONNRESET, errno.EPIPE, errno.ENOENT, errno.EAGAIN):  # a socket that would block
        assert not is_resource(of(code))


@pytest.mark.parametrize(
    ("mode", "gid", "says"),
    [(0o660, 1, "usermod -aG"), (0o660, 0, "chgrp kvm"), (0o600, 0, "chmod 660"), (0o600, 1, "only ")],
)
def test_a_device_s_hint_is_what_its_owner_group_and_mode_call_for(tmp_path, mode, gid, says):
    device = tmp_path / "kvm"
    device.touch()
    try:
        os.chown(device, -1, gid)
    except PermissionError:
        pytest.skip("only root gives a file to another group")
    device.chmod(mode)
    assert says in device_hint(device, "kvm")
    assert ("chmod" in device_hint(device, "kvm")) == (says != "usermod -aG")
    assert "$USER, then log in again" in device_hint(device, "kvm")


def test_the_owner_of_a_file_is_told_by_name_if_he_has_one(tmp_path):
    assert owner_of(tmp_path) == pwd.getpwuid(os.geteuid()).pw_name
    assert owner_of(tmp_path / "none") == ""
