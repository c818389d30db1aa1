"""What listens: at every address of a name, in both families; a Unix socket for its own user and root."""

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from descriptors import open_descriptors
from processes import GIVE_UP_S

from pageferry.engine.wire.channel import Endpoint
from pageferry.engine.wire.listener import listen_tcp, listen_unix, resolve


def reach(listener, host, port):
    """Connect as a source does; return the address that the listener sees."""
    channel = Endpoint(host=host, port=port).connect(10)
    sock = listener.accept()
    peer = sock.getpeername()[0]
    sock.close()
    channel.close()
    return peer


def test_all_of_both_families():
    with listen_tcp("::", 0) as listener:
        assert reach(listener, "127.0.0.1", listener.port) == "::ffff:127.0.0.1"
        assert reach(listener, "::1", listener.port) == "::1"


def test_one_ipv6_address_takes_no_ipv4():
    with listen_tcp("::1", 0) as listener, pytest.raises(ConnectionRefusedError):
        Endpoint(host="127.0.0.1", port=listener.port).connect(10)


#: Has its own view of names, and a network of its own with fe80::1 on its loopback interface; does what follows it.
_NAMESPACE = """
import ctypes, fcntl, json, os, socket, struct, sys
hosts = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(hosts.encode(), b"/etc/hosts", None, 0x1000, None):  # MS_BIND
    raise OSError(ctypes.get_errno(), "mount")
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sH22x", b"lo", 0x41))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
    for address in ("fe80::1", "fd00::1"):
        ours = socket.inet_pton(socket.AF_INET6, address)
        fcntl.ioctl(sock, 0x8916, struct.pack("16sIi", ours, 64, socket.if_nametoindex("lo")))  # SIOCSIFADDR
"""


def in_a_namespace(tmp_path, names, script):
    """Run a script in a network of its own, with the names of these lines of a hosts file; return what it printed."""
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{line}\n" for line in names))
    enter = ["unshare", "--map-root-user", "--net", "--mount"]
    if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host does not allow a network namespace (unshare --map-root-user --net)")
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*enter, sys.executable, "-c", _NAMESPACE + script, str(hosts)],
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


_REACH = """
from pageferry.engine.wire.channel import Channel, Endpoint
def reached(at, by):
    endpoint = Endpoint.parse(at)
    with endpoint.listen() as listener:
        try:
            channel = Endpoint.parse(by.format(port=listener.port)).connect(10)
        except OSError as error:
            return str(error)
        sock = listener.accept()
        peer = sock.getpeername()[0]
        sock.close()
        channel.close()
    return peer
"""


def test_a_link_local_address_and_names(tmp_path):
    names = ["fd00::1 six", "127.0.0.1 four", "fd00::1 both", "127.0.0.1 both", "192.0.2.1 partly", "127.0.0.1 partly"]
    cases = {
        "link-local": ("tcp://[fe80::1%lo]:0", "tcp://[fe80::1%lo]:{port}"),
        "only IPv6": ("tcp://six:0", "tcp://six:{port}"),
        "only IPv4": ("tcp://four:0", "tcp://four:{port}"),
        "both, by the one": ("tcp://both:0", "tcp://[fd00::1]:{port}"),
        "both, by the other": ("tcp://both:0", "tcp://127.0.0.1:{port}"),
        "by an address that is not there": ("tcp://four:0", "tcp://both:{port}"),
        "one of them is ours": ("tcp://partly:0", "tcp://127.0.0.1:{port}"),
        "no such interface": ("tcp://[::]:0", "tcp://[fe80::1%nix0]:{port}"),
    }
    found = in_a_namespace(
        tmp_path, names, f"{_REACH}\nprint(json.dumps({{k: reached(*v) for k, v in {cases!r}.items()}}))"
    )
    assert found == {
        "link-local": "fe80::1",
        "only IPv6": "fd00::1",
        "only IPv4": "127.0.0.1",
        "both, by the one": "fd00::1",
        "both, by the other": "127.0.0.1",
        "by an address that is not there": "127.0.0.1",
        "one of them is ours": "127.0.0.1",
        "no such interface": "[Errno 19] there is no network interface nix0",
    }


def test_both_ends_try_the_same_addresses_in_the_same_order():
    assert resolve("127.0.0.1", 5) == [(socket.AF_INET, ("127.0.0.1", 5))]
    assert resolve("::1", 5) == [(socket.AF_INET6, ("::1", 5, 0, 0))]


def test_port_0_is_for_one_who_listens():
    with pytest.raises(OSError, match="port 0 is for listening only"):
        Endpoint(host="127.0.0.1").connect(10)


def test_an_address_in_use_is_an_error_and_leaves_no_socket_behind():
    with listen_tcp("127.0.0.1", 0) as listener:
        before = open_descriptors()
        with pytest.raises(OSError, match="in use"):
            listen_tcp("127.0.0.1", listener.port)
        assert open_descriptors() == before


def test_a_listener_removes_its_own_path_and_no_other(tmp_path):
    """The socket's file was removed, another process listens at the same path, and only then the first one ends."""
    path = tmp_path / "x"
    first = listen_unix(path)
    path.unlink()
    with listen_unix(path) as second:
        first.close()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            second.accept().close()
    assert not path.exists()


def test_a_shutdown_wakes_one_who_waits():
    listener = listen_tcp("127.0.0.1", 0)
    woken = threading.Event()

    def wait():
        with pytest.raises(OSError, match=r"Invalid argument|Bad file"):
            listener.accept()
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    listener.shutdown()
    thread.join()
    assert woken.is_set()
    listener.close()
    with pytest.raises(OSError, match="closed"):
        listener.accept()


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_socket_is_its_owners_alone_from_its_first_moment(tmp_path, umask):
    path = tmp_path / "x"
    at_bind = []

    def look(_frame, event, function):
        if event == "c_return" and function.__name__ == "bind":
            at_bind.append(stat.S_IMODE(path.stat().st_mode))

    before = os.umask(umask)
    sys.setprofile(look)
    try:
        listener = listen_unix(path)
    finally:
        sys.setprofile(None)
        os.umask(before)
    assert at_bind == [0o600 & ~umask]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()


_CONNECT_AS = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[2])
print(len(sock.recv(1)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")
def test_another_user_who_can_reach_the_socket_is_not_let_in():
    with tempfile.TemporaryDirectory() as folder, listen_unix(path := Path(folder, "x"), backlog=8) as listener:
        path.parent.chmod(0o755)
        path.chmod(0o666)  # as on a file system that knows no modes
        stranger = subprocess.Popen(
            [sys.executable, "-c", _CONNECT_AS, "65534", str(path)], stdout=subprocess.PIPE, text=True
        )
        assert listener.accept_within(GIVE_UP_S) is None
        assert stranger.communicate(timeout=GIVE_UP_S)[0] == "0\n"
        assert stranger.returncode == 0
        ours = Endpoint(path=str(path)).connect(10)
        listener.accept().close()
        ours.close()
