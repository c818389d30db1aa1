"""Where changes begin: what was recorded, and each fault that once was found and that a peer, file or client can cause.

Those of a fault say by their outcome that it is mended. What no peer, file or command causes is tested elsewhere: the
names of a save's files in tests/integration/test_save.py, silence and trickles in test_arriving.py and
test_dead_network.py, a thousand attempts in test_nothing_left.py, the certificates in test_tls.py.
"""

import gzip
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from xen_files import libxl_stream, xl_file

from fuzz.record import SMALL_BYTES
from fuzz.script import RECORDED, Turn, place_of, read_script
from fuzz.structure import Chunk, cut, joined
from fuzz.targets import (
    DestinationTarget,
    InspectTarget,
    QmpTarget,
    ReaderTarget,
    Seed,
    SourceTarget,
    StateTarget,
    Target,
)
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, PCI_HOLE_END, PCI_HOLE_START
from pageferry.core.ram import MAX_MEMORY_BYTES
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine import features
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.stream.ferry_bodies import body_of
from pageferry.stream.ferry_frames import TYPE_OF, Complete, Failed, FrameType, Join, Known, Recover, Running

_GOLDEN = Path(__file__).parents[1] / "golden"
_GiB = 1 << 30
_NO_PROOF = b"0" * 64
_CONVERSATIONS = ("plain", "audit", "packed", "postcopy", "hole")


def _framed(frame: object) -> bytes:
    """Return a frame whose proof, if it has one, is made when it is played."""
    kind = TYPE_OF[type(frame)]
    return bytes(Chunk(kind.name, body_of(frame), (4, 4), [int(kind), 0], 1))


def _preamble(turns: tuple[Turn, ...], connection: int) -> Turn:
    return replace(turns[0], connection=connection)


def _is(turn: Turn, kind: FrameType) -> bool:
    return turn.said.startswith(int(kind).to_bytes(4, "little"))


def _hello(turns: tuple[Turn, ...], **changes: object) -> tuple[Turn, ...]:
    """Return turns in which the source's hello says something else."""

    def changed(turn: Turn) -> Turn:
        if not _is(turn, FrameType.SOURCE_HELLO):
            return turn
        chunk = cut(turn.said)[0]
        assert isinstance(chunk.body, bytes)
        chunk.body = json.dumps(json.loads(chunk.body) | changes).encode()
        return replace(turn, said=bytes(chunk))

    return tuple(map(changed, turns))


def _without(turns: tuple[Turn, ...], *kinds: FrameType) -> tuple[Turn, ...]:
    return tuple(turn for turn in turns if not any(_is(turn, kind) for kind in kinds))


def _instead(turns: tuple[Turn, ...], kind: FrameType, said: bytes, after_s: float = 0.0) -> tuple[Turn, ...]:
    return tuple(replace(turn, said=said, after_s=after_s) if _is(turn, kind) else turn for turn in turns)


def _proving(turns: tuple[Turn, ...], kind: FrameType, proof: bytes) -> tuple[Turn, ...]:
    return tuple(replace(turn, said=turn.said.replace(place_of(kind), proof)) for turn in turns)


def _up_to(turns: tuple[Turn, ...], kind: FrameType) -> tuple[Turn, ...]:
    return turns[: next(at for at, turn in enumerate(turns) if _is(turn, kind)) + 1]


def destination_seeds() -> dict[str, Seed]:
    """Return what sources say."""
    recorded = {name: tuple(read_script(f"{name}-source.xz")) for name in _CONVERSATIONS}
    seeds = {name: Seed(turns=turns, outcome="^completed$", recorded=name) for name, turns in recorded.items()}
    plain, packed, postcopy = recorded["plain"], recorded["packed"], recorded["postcopy"]
    offer = _up_to(plain, FrameType.SOURCE_HELLO)
    three_gib = {"memory_bytes": 3 * _GiB, "populated": [[0, 3 * _GiB // PAGE_SIZE]], "populated_pages": 0}
    all_of_it = {**three_gib, "memory_bytes": MAX_MEMORY_BYTES, "populated": [[0, MAX_MEMORY_BYTES // PAGE_SIZE]]}
    joined_late = tuple(turn for turn in packed if turn.connection != 2)
    faults = {
        "a hello that takes the receiver's memory": (_hello(offer, **three_gib), "^source: "),
        "a hello for more memory than is taken": (_hello(offer, **all_of_it), "at the most is taken here"),
        "a hello for more vCPUs than are taken": (_hello(offer, cpus=1000), "at the most are taken here"),
        "runs that end before they begin": (_hello(offer, populated=[[5, 3], [4, 2]]), "^source: "),
        "a replayed migration": (_proving(plain, FrameType.SOURCE_HELLO, _NO_PROOF), "perhaps a recording"),
        "a page forged with the token": (_proving(packed, FrameType.JOIN, _NO_PROOF), "^source: "),
        "a connection that joins twice": ((*joined_late, *_again(packed, 1, as_connection=2)), "^source: "),
        "a stranger's return": ((offer[0], Turn(connection=0, said=_framed(Recover(proof="")))), "is not here"),
        "a join without a migration": (
            (offer[0], Turn(connection=0, said=_framed(Join(proof="", index=1)))),
            "out of turn",
        ),
        "silence": ((Turn(connection=0, said=b""),), "^source: "),
        "a browser": ((Turn(connection=0, said=b"GET / HTTP/1.1\r\n\r\n"),), "an HTTP client"),
        "half a preamble": ((Turn(connection=0, said=plain[0].said[:20]),), "^source: "),
        "a page in the hole": (_page(recorded["hole"], PCI_HOLE_START >> PAGE_SHIFT), "0xc0000 is outside the guest"),
        "a page where the hole ends": (
            _page(recorded["hole"], (PCI_HOLE_END >> PAGE_SHIFT) - 1),
            "is outside the guest",
        ),
        "a page beyond RAM": (_page(plain, (SMALL_BYTES >> PAGE_SHIFT)), "is outside the guest"),
        "a trickle": (_trickled(plain), "^completed$"),
        "a commit after the lease": (
            _late(_hello(plain, lease_ms=1), FrameType.COMMIT),
            "did not hand the guest over in time",
        ),
        "a switch after the lease": (
            _late(_hello(postcopy, lease_ms=1), FrameType.SWITCH),
            "did not hand the guest over in time",
        ),
        "a source that fails before its commit": (
            _instead(plain, FrameType.COMMIT, _framed(Failed(reason="no"))),
            "^source: no",
        ),
        "DROPPED that is lost": (_without(plain, FrameType.DROPPED), "^completed$"),
        "a source that is lost after the switch": (_up_to(postcopy, FrameType.SWITCH), "^destination: "),
        "memory handed over that is none": (
            _hello(offer, features=[features.SHARED_MEMORY]),
            "not a file of the guest's size that stays so",
        ),
    }
    names = {"a page forged with the token": "", "memory handed over that is none": "handed"}
    for name, (turns, outcome) in faults.items():
        seeds[name] = Seed(turns=turns, outcome=outcome, recorded=names.get(name, ""))
    return seeds


def _page(turns: tuple[Turn, ...], gfn: int) -> tuple[Turn, ...]:
    """Return turns in which the first page that comes is another."""
    at, chunks = next((at, cut(turn.said)) for at, turn in enumerate(turns) if turn.said[:8] == b"\xff" * 8)
    body = next(chunk.body for chunk in chunks if chunk.name == "PAGE_DATA")
    assert not isinstance(body, bytes)
    body[0].fields[2] = gfn
    return (*turns[:at], replace(turns[at], said=joined(chunks)), *turns[at + 1 :])


def _late(turns: tuple[Turn, ...], kind: FrameType) -> tuple[Turn, ...]:
    return tuple(replace(turn, after_s=0.01) if _is(turn, kind) else turn for turn in turns)


def _again(turns: tuple[Turn, ...], connection: int, as_connection: int) -> tuple[Turn, ...]:
    return tuple(replace(turn, connection=as_connection) for turn in turns if turn.connection == connection)


def _trickled(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the first two turns byte by byte. The second is proven by its place, so only its frame's head is cut."""
    first, second, *rest = turns
    pieces = [bytes([byte]) for byte in first.said] + [second.said]
    return (*(replace(first, said=piece) for piece in pieces), *rest)


def source_seeds() -> dict[str, Seed]:
    """Return what destinations say."""
    recorded = {name: tuple(read_script(f"{name}-destination.xz")) for name in _CONVERSATIONS if name != "hole"}
    seeds = {name: Seed(turns=turns, outcome="^completed$", recorded=name) for name, turns in recorded.items()}
    plain, postcopy = recorded["plain"], recorded["postcopy"]
    known = Turn(connection=1, said=_framed(Known(proof=place_of(FrameType.KNOWN).decode())))
    unknown = Turn(connection=1, said=_framed(Known(proof=_NO_PROOF.decode())))
    failed = _framed(Failed(reason="the destination gave up"))
    back = (_preamble(plain, 1), known)
    unanswered = _without(plain, FrameType.RUNNING)
    faults = {
        "a destination that gives up before the commit": (_instead(plain, FrameType.READY, failed), "^source: "),
        "a destination that refuses the commit": (_instead(plain, FrameType.RUNNING, failed), "^source: "),
        "a commit that is not answered": (unanswered, "^unknown: "),
        "a commit answered on return": (
            (*unanswered, *back, Turn(connection=1, said=_framed(Running()))),
            "^completed$",
        ),
        "a promise on return": ((*unanswered, *back, Turn(connection=1, said=failed)), "^source: "),
        "a promise without a proof": (
            (*unanswered, _preamble(plain, 1), unknown, Turn(connection=1, said=failed)),
            "^unknown: ",
        ),
        "a recorded destination": (_proving(plain, FrameType.DESTINATION_HELLO, _NO_PROOF), "perhaps a recording"),
        "RUNNING before the commit": (_instead(plain, FrameType.READY, _framed(Running())), "^source: "),
        "a switch that is not answered": (_without(postcopy, FrameType.RUNNING), "^(unknown|source|destination): "),
        "a destination that is lost after the switch": (_up_to(postcopy, FrameType.RUNNING), "^destination: "),
        "COMPLETE before a page was asked for": (
            _instead(postcopy, FrameType.WANTED, _framed(Complete())),
            "^(completed|destination)",
        ),
    }
    for name, (turns, outcome) in faults.items():
        seeds[name] = Seed(turns=turns, outcome=outcome, recorded="postcopy" if turns[1] is postcopy[1] else "plain")
    return seeds


def _file(name: str) -> bytes:
    return lzma.decompress((RECORDED / f"guest-{name}.xz").read_bytes())


def _one(data: bytes, outcome: str, recorded: str = "") -> Seed:
    return Seed(turns=(Turn(connection=0, said=data),), outcome=outcome, recorded=recorded)


def file_seeds() -> dict[str, Seed]:
    """Return guests in files."""
    golden = (_GOLDEN / "pageferry-v3-3-all-state.bin").read_bytes()
    return {
        "a PC of soft": _one(_file("soft"), "restored|cannot live"),
        "a PC of kvm": _one(_file("kvm"), "restored|UnsupportedError|VmError"),
        "all state": _one(golden, "RecordError: .* is broken memory"),
        "nothing": _one(b"", "TruncatedError"),
    }


def inspect_seeds() -> dict[str, Seed]:
    """Return streams, also as Xen's tools and packers wrap them."""
    soft = _file("soft")
    golden = (_GOLDEN / "pageferry-v3-2-cpu-events.bin").read_bytes()
    return {
        "a saved guest": _one(soft, "exit code (0|10)"),
        "a golden stream": _one(golden, "exit code (0|10)"),
        "a file of xl": _one(xl_file(libxl_stream(golden)), "exit code (0|10)"),
        "packed by gzip": _one(gzip.compress(golden, mtime=0), "exit code (0|10)"),
        "packed by xz": _one(lzma.compress(golden), "exit code (0|10)"),
        "nothing": _one(b"", "exit code 7"),
    }


def state_seeds() -> tuple[dict[str, Seed], dict[str, VmConfig]]:
    """Return machines' states, and what they are of."""
    seeds, configs = {}, {}
    for name in ("soft", "kvm"):
        data = _file(name)
        (context,) = [chunk for chunk in cut(data) if chunk.name == "HVM_CONTEXT"]
        seeds[f"a PC of {name}"] = _one(joined(context.body), "loaded|Error", recorded=name)
        configs[name] = _config_of(data)
    (context,) = [c for turn in read_script("plain-source.xz") for c in cut(turn.said) if c.name == "HVM_CONTEXT"]
    seeds["a plain machine"] = _one(joined(context.body), "loaded", recorded="plain")
    configs["plain"] = VmConfig(memory_bytes=4 << 20, machine=MachineModel.PLAIN)
    seeds["a time that soon does not fit"] = _one(_with_device(context.body, "clock", b"\xff" * 8), "cannot have")
    return seeds, configs


def _with_device(entries: bytes | list[Chunk], name: str, data: bytes) -> bytes:
    """Return a machine's state with another state of one device."""
    assert not isinstance(entries, bytes)
    for entry in entries:
        if not isinstance(entry.body, bytes) and entry.body[0].name == f"device {name}":
            entry.body[0].body = data
    return joined(entries)


def _config_of(data: bytes) -> VmConfig:
    fd = os.memfd_create("guest")
    try:
        os.write(fd, data)
        with SavedGuest(Path("guest"), fd) as saved:
            return saved.config
    finally:
        os.close(fd)


_COMMANDS = (
    {"execute": "query-status"},
    {"execute": "query-migrate", "id": [1, {"a": None}]},
    {"execute": "query-commands"},
    {"execute": "x-query-guest", "arguments": {}},
    {"execute": "query-cpus-fast"},
    {"execute": "stop"},
    {"execute": "cont", "arguments": {"x-force": False}},
    {"execute": "migrate_cancel"},
    {"execute": "migrate-continue", "arguments": {"state": "pre-switchover"}},
    {"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 300, "max-bandwidth": 1 << 30}},
    {"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "events", "state": True}]}},
    {"execute": "query-migrate-parameters"},
    {"execute": "query-migrate-capabilities"},
    {"execute": "migrate", "arguments": {"uri": "unix:/nowhere/at/all", "x-max-rounds": 3, "x-policy": "xen"}},
    {"execute": "migrate", "arguments": {"uri": "tcp:127.0.0.1:1", "x-connections": 2, "x-timeout-s": 0.1}},
    {"execute": "migrate", "arguments": {"uri": "tls://127.0.0.1:1", "x-tls-dir": "/nowhere", "x-peer": "x"}},
    {"execute": "migrate", "arguments": {"uri": "unix:/nowhere", "resume": True}},
    {"execute": "x-console-write", "arguments": {"data": "aGVsbG8="}},
    {"execute": "x-console-follow"},
    {"execute": "system_powerdown"},
    {"execute": "quit"},
)
_TOO_DEEP = b'{"execute":"query-status","id":' + b"[" * 5000 + b"]" * 5000 + b"}"


def qmp_seeds() -> dict[str, Seed]:
    """Return what clients say."""
    seeds = {
        f"{at} {each['execute']}": _one(json.dumps(each).encode(), "commands were done")
        for at, each in enumerate(_COMMANDS)
    }
    for policy in ("os:abort", "os:fork", "http.server:test", "os:_exit"):
        command = {"execute": "migrate", "arguments": {"uri": "unix:/nowhere", "x-policy": policy}}
        seeds[f"the policy {policy}"] = _one(json.dumps(command).encode(), "^1 commands were done")
    seeds["nested too deep"] = _one(_TOO_DEEP, "^1 commands were done")
    seeds["no number"] = _one(b'{"execute":"query-status","id":NaN}', "^1 commands were done")
    return seeds


def state_target() -> StateTarget:
    """Return the machines' states."""
    seeds, configs = state_seeds()
    return StateTarget(seeds=seeds, configs=configs)


TARGETS: dict[str, Callable[[], Target]] = {
    "destination": lambda: DestinationTarget(seeds=destination_seeds()),
    "source": lambda: SourceTarget(seeds=source_seeds()),
    "file": lambda: ReaderTarget(seeds=file_seeds()),
    "inspect": lambda: InspectTarget(seeds=inspect_seeds()),
    "state": state_target,
    "qmp": lambda: QmpTarget(seeds=qmp_seeds()),
}
