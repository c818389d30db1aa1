"""A network that dies takes nothing along: both ends notice within their time, and tell it while they wait."""

import shutil
import subprocess
import threading
import uuid

import pytest
from at_work import until
from processes import cli

#: How long the source waits: long enough for its words to be seen on a busy host, shorter than the destination does.
TIMEOUT_S = 20


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def network():
    """Two network namespaces with one wire between them; ``cut()`` takes it away without a word."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command (iproute2)")
    here, there = (f"pf-{uuid.uuid4().hex[:8]}" for _ in range(2))
    try:
        ip("netns", "add", here)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        ip("netns", "add", there)
        ip("-n", here, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", there)
        for name, address in ((here, "10.99.0.1/24"), (there, "10.99.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
        yield Network(here, there)
    finally:
        for name in (here, there):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Network:
    """``here`` and ``there`` run commands in one namespace each."""

    def __init__(self, here, there):
        self._names = here, there
        self.here, self.there = (("ip", "netns", "exec", name) for name in self._names)

    def cut(self):
        """From now on each packet goes to a station that is not there: no end hears an error, as when a switch dies."""
        for name, other in zip(self._names, ("10.99.0.2", "10.99.0.1"), strict=True):
            nobody = "02:00:00:00:00:01"
            ip("-n", name, "neigh", "replace", other, "lladdr", nobody, "dev", "wire", "nud", "permanent")


def tells(process, words):
    """The status of a process says so."""
    shown = []

    def said():
        shown[:] = [cli("status", "--control", process.control).stdout]
        return words in shown[0]

    until(said, lambda: f"{words!r} in {shown}", 0.05)


@pytest.mark.exhaustive("the destination waits for half a minute")
@pytest.mark.parametrize("phase", ["pre-copy", "pause", "post-copy"])
def test_a_network_that_dies_is_noticed_and_told_at_both_ends(start, network, phase):
    uri = "tcp://10.99.0.2:4444"
    there = start("receive", uri, "--accel", "soft", "--insecure", name="there", within=network.there)
    source = start(
        *("run", "hotset", "--accel", "soft", "--memory", "64M", "--working-set", "16M"),
        name="source",
        within=network.here,
    )
    assert source.runs_on()
    slow = {"x-bandwidth": 2 << 20}
    options = {
        "pre-copy": {"x-hold": True},
        "pause": {"x-policy": "xen", "x-max-rounds": 1, **slow},
        "post-copy": {"x-policy": "postcopy", "x-max-rounds": 1, **slow},
    }[phase]
    source.ask("migrate", uri=uri, **{"x-timeout-s": TIMEOUT_S}, **options)
    reached = {
        "pre-copy": lambda: source.ask("query-migrate")["status"] == "pre-switchover",
        "pause": lambda: source.status() == "finish-migrate",
        "post-copy": lambda: source.ask("query-migrate")["status"] == "postcopy-active",
    }
    source.until(reached[phase], phase)
    network.cut()
    watch = threading.Thread(target=tells, args=(there, "nothing has come from its source for "))
    watch.start()
    tells(source, "the other end has been silent for ")
    watch.join()
    if phase != "post-copy":
        source.until(lambda: source.ask("query-migrate")["status"] == "failed", "end")
        assert f"stood still for {TIMEOUT_S} s" in source.ask("query-migrate")["error-desc"]
        assert source.runs_on()
        there.until(lambda: "no guest received" in there.log.read_text(), "end there")
        assert there.status() == "inmigrate"
        return
    source.until(lambda: source.ask("query-migrate")["status"] == "postcopy-paused", "pause")
    assert f"stood still for {TIMEOUT_S} s" in source.ask("query-migrate")["x-postcopy-paused"]
    there.until(lambda: there.status() == "paused", "pause there")
    assert "the guest stands still until its source comes back" in there.log.read_text()
