"""A migration against a plain copy of the same bytes: same host, same minute, alternating.

Both move the content of a populated guest from a memfd in one process to a fresh memfd in another, over loopback TCP
with the same socket buffers. The plain copy is a loop of ``send`` and ``recv_into`` in pieces of 4 MiB. The migration
is everything that a user gets: hello, log-dirty, rounds, state, verification of every page, handoff; its time is the
report's ``total_s``, from connect to the acknowledgement that the guest runs.

Before each, another process touches twice as much memory and gives it back: on a virtual host the first touch of memory
that the host had taken away costs five times as much as any other, and would be all that is measured.

The ratio is the migration's throughput divided by the plain copy's (above 1: faster; populating ahead makes that
possible). Target: at least 0.7.
"""

import argparse
import contextlib
import json
import multiprocessing
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pageferry.core.memory import GuestMemory
from pageferry.core.policies import XenPolicy
from pageferry.core.vm import VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.source import Source
from pageferry.engine.transport import Channel, Endpoint
from pageferry.guests.boot import boot
from pageferry.guests.workloads import load_workload
from pageferry.vmm.accel import Accel, choose_machines

PIECE_BYTES = 4 << 20


def fill(memory: GuestMemory, first_byte: int) -> None:
    """Give every page from ``first_byte`` on its own content."""
    view = np.frombuffer(memory.mapping.view, np.uint64)[first_byte // 8 : memory.size_bytes // 8]
    view[:] = np.arange(view.size, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)


def touch_receiver(pipe: Connection, size_bytes: int) -> None:
    """Touch so much memory and give it back: what a virtual host has touched lately it hands out faster."""
    memory = GuestMemory.linear(size_bytes)
    memory.populate(np.array([0], np.uint64), np.array([size_bytes >> 12], np.uint64))
    pipe.send(0)


def plain_receiver(pipe: Connection, size_bytes: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        sock, _ = listener.accept()
        channel = Channel(sock)
        view = GuestMemory.linear(size_bytes).mapping.view
        for at in range(0, size_bytes, PIECE_BYTES):
            channel.receive_into([view[at : min(at + PIECE_BYTES, size_bytes)]])
        channel.send([b"."])
        channel.close()


def plain_copy(size_bytes: int) -> float:
    """Return the seconds that the plain copy took, from connect to the receiver's last word."""
    memory = GuestMemory.linear(size_bytes)
    fill(memory, 0)
    with Child(touch_receiver, 2 * size_bytes):
        pass
    with Child(plain_receiver, size_bytes) as port:
        began_s = time.perf_counter()
        channel = Endpoint(host="127.0.0.1", port=port).connect(30)
        for at in range(0, size_bytes, PIECE_BYTES):
            channel.send([memory.mapping.view[at : min(at + PIECE_BYTES, size_bytes)]])
        if channel.receive_some(1) != b".":
            raise RuntimeError("the receiver did not finish")
        took_s = time.perf_counter() - began_s
        channel.close()
    return took_s


def migration_receiver(pipe: Connection, accel: str) -> None:
    machines = choose_machines(Accel(accel))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        sock, _ = listener.accept()
        vm = Destination(Channel(sock), machines.make_vm, accel=accel).run()
        pipe.recv()
        vm.close()


def migration(size_bytes: int, accel: str) -> tuple[float, dict[str, Any]]:
    """Return the seconds that a migration took, and its report."""
    vm = choose_machines(Accel(accel)).make_vm(VmConfig(memory_bytes=size_bytes))
    boot(vm, load_workload("idle"))
    fill(vm.memory, 2 << 20)
    with Child(touch_receiver, 2 * size_bytes):
        pass
    with Child(migration_receiver, accel) as port:
        vm.resume()
        source = Source(vm, Endpoint(host="127.0.0.1", port=port), XenPolicy())
        report = source.run()
    vm.close()
    return report.total_s, report.to_json()


class Child:
    """A process of its own that tells the port at which it listens."""

    def __init__(self, target: Callable[..., None], argument: int | str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, argument))

    def __enter__(self) -> int:
        self._process.start()
        return int(self._pipe.recv())

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self._pipe.send(None)
        self._process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="256 MiB and two pairs instead of 1 GiB and five")
    parser.add_argument("--accel", default="auto", choices=["auto", "kvm", "soft"])
    options = parser.parse_args()
    size_bytes, pairs = (256 << 20, 2) if options.quick else (1 << 30, 5)
    accel = choose_machines(Accel(options.accel)).accel

    plain_copy(size_bytes)  # warm-up
    plain_s, moved_s, reports = [], [], []
    for _ in range(pairs):
        plain_s.append(plain_copy(size_bytes))
        took_s, report = migration(size_bytes, accel)
        moved_s.append(took_s)
        reports.append(report)
    ratios = [plain / moved for plain, moved in zip(plain_s, moved_s, strict=True)]
    result = {
        "accel": accel,
        "memory_bytes": size_bytes,
        "pairs": pairs,
        "plain_bytes_per_s": size_bytes / statistics.median(plain_s),
        "migration_bytes_per_s": size_bytes / statistics.median(moved_s),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "downtime_s_median": statistics.median(report["downtime_s"] for report in reports),
        "verify_s_median": statistics.median(report["downtime_parts_s"]["verify"] for report in reports),
    }
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{accel}, {size_bytes >> 20} MiB populated, {pairs} pairs, medians")
    print(f"  plain copy  {result['plain_bytes_per_s'] / 1e9:6.2f} GB/s")
    print(f"  migration   {result['migration_bytes_per_s'] / 1e9:6.2f} GB/s, everything included")
    print(f"  ratio       {result['ratio_median']:6.2f} ({result['ratio_min']:.2f} to {result['ratio_max']:.2f})")
    verify_ms = result["verify_s_median"] * 1e3
    print(f"  downtime    {result['downtime_s_median'] * 1e3:6.1f} ms, {verify_ms:.1f} of it verification")


if __name__ == "__main__":
    main()
