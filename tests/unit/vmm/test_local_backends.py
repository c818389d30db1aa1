"""Disks and networks for a guest's devices here: named by the user, as at its source, or refused."""

import socket
from pathlib import Path

import pytest

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.errors import UsageError
from pageferry.engine.wire.listener import listen_tcp
from pageferry.vmm.local_backends import AS_AT_THE_SOURCE, LocalBackends, absolute, is_local

DISK = DeviceSpec(kind=DeviceKind.DISK, backend="/there/disk", size_bytes=512)
NET = DeviceSpec(kind=DeviceKind.NET, backend="tap:there", mac="52:54:00:12:34:56")
RNG = DeviceSpec(kind=DeviceKind.RNG)
SPECS = (DISK, RNG, NET, DISK)


def test_what_is_said_replaces_what_the_source_has_and_nothing_else():
    chosen = LocalBackends.parse(["1=/here/disk"], ["0=tap:here"]).choose(SPECS, trusted=True)
    assert [spec.backend for spec in chosen] == ["/there/disk", "", "tap:here", "/here/disk"]
    assert [(spec.kind, spec.mac, spec.size_bytes) for spec in chosen] == [
        (spec.kind, spec.mac, spec.size_bytes) for spec in SPECS
    ]
    assert AS_AT_THE_SOURCE.choose(SPECS, trusted=True) == SPECS
    first, *_ = LocalBackends.parse(["0=/here/disk,direct"], []).choose(SPECS, trusted=True)
    assert first.backend == "/here/disk,direct"


def test_a_source_elsewhere_may_have_no_file_of_ours_opened():
    with pytest.raises(UsageError, match="disk0 of the guest is /there/disk at its source"):
        AS_AT_THE_SOURCE.choose(SPECS, trusted=False)
    with pytest.raises(UsageError, match="net0"):
        LocalBackends.parse(["0=a", "1=b"], []).choose(SPECS, trusted=False)
    chosen = LocalBackends.parse(["0=/a", "1=/b"], ["0=tap:c"]).choose(SPECS, trusted=False)
    assert [spec.backend for spec in chosen] == ["/a", "", "tap:c", "/b"]
    assert AS_AT_THE_SOURCE.choose((RNG,), trusted=False) == (RNG,)


def test_what_the_guest_has_not_and_another_kind_of_network_are_refused():
    with pytest.raises(UsageError, match="no disk2"):
        LocalBackends.parse(["2=/a"], []).choose(SPECS, trusted=True)
    with pytest.raises(UsageError, match="net0 of the guest is a tap at its source and would be a unix here"):
        LocalBackends.parse([], ["0=unix:/a"]).choose(SPECS, trusted=True)


@pytest.mark.parametrize("text", ["", "/a", "=/a", "x=/a", "0=", "-1=/a", "²=/a"])
def test_what_says_nothing_is_refused(text):
    with pytest.raises(UsageError, match="not a disk"):
        LocalBackends.parse([text], [])


def test_paths_mean_the_same_everywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute(DeviceKind.DISK, "a") == str(Path(tmp_path, "a"))
    assert absolute(DeviceKind.NET, "unix:s") == f"unix:{Path(tmp_path, 's')}"
    assert absolute(DeviceKind.NET, "tap:tap0") == "tap:tap0"
    assert absolute(DeviceKind.NET, "unix:") == "unix:"


@pytest.mark.parametrize(
    ("host", "source"), [("127.0.0.1", "127.0.0.1"), ("::", "127.0.0.1"), ("::", "127.0.0.2"), ("::1", "::1")]
)
def test_a_source_on_this_host_is_known_by_its_connection(host, source):
    with listen_tcp(host, 0) as listener:
        client = socket.create_connection((source, listener.port), source_address=(source, 0))
        server = listener.accept()
    assert is_local(server)
    client.close()
    server.close()


def test_a_unix_socket_is_on_this_host_and_an_address_that_is_not_ours_is_not():
    pair = socket.socketpair()
    assert is_local(pair[0])
    for sock in pair:
        sock.close()

    class Elsewhere:
        family = socket.AF_INET6

        def getsockname(self):
            return ("fe80::1%eth0", 1, 0, 2)

        def getpeername(self):
            return ("fe80::2%eth0", 1, 0, 2)

    assert not is_local(Elsewhere())
