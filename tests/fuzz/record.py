"""Records what is fuzzed: migrations between two machines here, as each end heard them, and a guest in a file.

    PYTHONPATH=tests:tests/helpers python -m fuzz.record

Needed when the protocol or a format changes so much that what was recorded is not understood any more; a test tells.
The guests never run, so little differs from time to time. One is of KVM, whose state has what the other has not.
"""

import lzma
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trips import Inn, source_of

from fuzz.script import RECORDED, Turn, without_proofs, write_script
from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policies import XenPolicy
from pageferry.core.policy import Action, Decision
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine.image.save import Save
from pageferry.engine.options import VerifyMode, WireOptions
from pageferry.engine.wire.channel import Endpoint
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.ferry_order import Side
from pageferry.stream.packing import Packing

#: No whole number of 2 MiB, so that the address space that was set aside goes on where RAM ends.
SMALL_BYTES = (4 << 20) + PAGE_SIZE
#: With RAM on both sides of the hole.
LARGE_BYTES = (3 << 30) + 3 * PAGE_SIZE
WORKING_SET_PAGES = 12


@dataclass
class Log:
    """What both ends said, in order: (side, connection, bytes)."""

    entries: list[tuple[Side, int, bytes]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tap(self, channel: Any, side: Side, connection: int) -> Any:
        """Return a channel of this side's that is listened to."""
        send = channel.send

        def tee(buffers, fd=None):
            copies = [bytes(buffer) for buffer in buffers]
            data = b"".join(copies)
            number = int.from_bytes(data[:4], "little")
            if number in FrameType.__members__.values():
                data = without_proofs(data, FrameType(number))
            with self.lock:
                self.entries.append((side, connection, data))
            send(copies, fd)

        channel.send = tee
        return channel

    def turns_of(self, side: Side) -> list[Turn]:
        """Return what a side said, in turns: what it said before the other said anything on that connection is one.

        A destination waits for an answer to each frame, or says the next by itself: each is a turn of its own.
        """
        turns: list[Turn] = []
        open_turns: dict[int, bool] = {}
        for speaker, connection, data in self.entries:
            if speaker is not side:
                open_turns[connection] = False
                continue
            last = next((at for at in reversed(range(len(turns))) if turns[at].connection == connection), None)
            if side is Side.SOURCE and open_turns.get(connection) and last is not None:
                turns[last] = Turn(connection=connection, said=turns[last].said + data)
            else:
                turns.append(Turn(connection=connection, said=data))
            open_turns[connection] = True
        return turns


class TappedInn(Inn):
    """A destination that is listened to."""

    log: Log

    def _heard(self, channel):
        return self.log.tap(channel, Side.DESTINATION, 0)

    def _watched(self, channel):
        return self.log.tap(channel, Side.DESTINATION, len(self.channels) - 1)


@dataclass
class TappedWay:
    """Where a source connects, and is listened to."""

    endpoint: Endpoint
    log: Log
    connections: int = 0

    def __getattr__(self, name):
        return getattr(self.endpoint, name)

    def __str__(self):
        return str(self.endpoint)

    def connect(self, timeout_s, **options):
        """Connect."""
        channel = self.log.tap(self.endpoint.connect(timeout_s, **options), Side.SOURCE, self.connections)
        self.connections += 1
        return channel


class Scribbles:
    """A policy under which pages change after each of so many rounds; then it stops the guest, or switches."""

    name = "scribbles"

    def __init__(self, vm: Any, rounds: int, *, switches: bool = False) -> None:
        self.switches = switches
        self._vm = vm
        self._rounds = rounds

    def decide(self, progress):
        """Scribble."""
        first = self._vm.memory.gfn_limit - WORKING_SET_PAGES
        for gfn in range(first, first + 6):
            self._vm.memory.write(gfn * PAGE_SIZE + 8 * len(progress.rounds), b"scribble")
        self._vm.memory.write((first + 6) * PAGE_SIZE, bytes(PAGE_SIZE))
        last = Action.POST_COPY if self.switches else Action.STOP_AND_COPY
        enough = len(progress.rounds) >= self._rounds
        return Decision(action=last if enough else Action.NEXT_ROUND, reason="scribbled")


def guest(
    memory_bytes: int = SMALL_BYTES, make_vm: Any = Domain, machine: MachineModel = MachineModel.PLAIN, **options: Any
) -> Any:
    """Return a machine with a booted guest that has not run."""
    vm = make_vm(VmConfig(memory_bytes=memory_bytes, machine=machine, **options))
    boot(vm, load_workload("kv"), params=GuestParams(working_set_bytes=WORKING_SET_PAGES * PAGE_SIZE, seed=7))
    first = vm.memory.gfn_limit - WORKING_SET_PAGES
    for gfn in range(max(first, vm.memory.gfn_limit - 3), vm.memory.gfn_limit):
        vm.memory.write(gfn * PAGE_SIZE, bytes([gfn % 251 + 1]) * PAGE_SIZE)
    return vm


def conversation(vm: Any, policy: Any, **options: Any) -> Log:
    """Move a guest; return what was said."""
    log = Log()
    inn = TappedInn(Domain)
    inn.log = log
    try:
        report = source_of(vm, TappedWay(inn.open(), log), policy, **options).run()
        assert report.status == "completed"
        assert inn.outcome() is inn.vm
    finally:
        inn.close()
        vm.close()
    return log


def conversations() -> dict[str, Log]:
    """Return migrations by name."""
    made = {}
    vm = guest()
    made["plain"] = conversation(vm, Scribbles(vm, 2), verify=VerifyMode.FULL)
    vm = guest()
    made["audit"] = conversation(vm, Scribbles(vm, 3), verify=VerifyMode.AUDIT)
    vm = guest()
    wire = WireOptions(connections=3, compress=Packing.LZ4, delta_cache_bytes=16 << 20)
    made["packed"] = conversation(vm, Scribbles(vm, 2), wire=wire)
    vm = guest()
    made["postcopy"] = conversation(vm, Scribbles(vm, 1, switches=True))
    vm = guest(LARGE_BYTES)
    vm.remove_pages(vm.memory.all_ram().gfns()[5000:5003])
    made["hole"] = conversation(vm, XenPolicy(max_rounds=1))
    return made


def saved(folder: Path, make_vm: Any, cpus: int) -> bytes:
    """Return a guest in a file: a PC with devices, whose state is the largest that there is."""
    devices = (DeviceSpec(kind=DeviceKind.RNG), DeviceSpec(kind=DeviceKind.BALLOON))
    vm = guest(SMALL_BYTES, make_vm, MachineModel.PC, devices=devices, cpus=cpus)
    try:
        if make_vm is Domain:
            vm.remove_pages(vm.memory.all_ram().gfns()[900:902])
        Save(vm, folder / "guest.bin", XenPolicy(), stop=True, on_event=lambda _: None).run()
    finally:
        vm.close()
    return (folder / "guest.bin").read_bytes()


def main() -> None:
    """Write all of it."""
    RECORDED.mkdir(exist_ok=True)
    for name, log in conversations().items():
        for side in Side:
            write_script(f"{name}-{side}.xz", log.turns_of(side))
    with tempfile.TemporaryDirectory() as folder:
        for name, make_vm, cpus in (("soft", Domain, 1), ("kvm", KvmVm, 2)):
            data = saved(Path(folder), make_vm, cpus)
            (RECORDED / f"guest-{name}.xz").write_bytes(lzma.compress(data, preset=9))


if __name__ == "__main__":
    main()
