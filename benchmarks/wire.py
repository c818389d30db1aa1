"""A migration against a plain copy of the same bytes: same host, same minute, alternating.

Both move the content of a populated guest from a memfd in one process to a fresh memfd in another, over loopback TCP
with the same socket buffers. The plain copy is a loop of ``send`` and ``recv_into`` in pieces of 4 MiB. The migration
is everything that a user gets: hello, log-dirty, rounds, state, verification of every page, handoff; its time is the
report's ``total_s``, from connect to the acknowledgement that the guest runs.

Before each, another process touches twice as much memory and gives it back: on a virtual host the first touch of memory
that the host had taken away costs five times as much as any other, and would be all that is measured.

The ratio is the migration's throughput divided by the plain copy's (above 1: faster; populating ahead makes that
possible). Target: at least 0.7.

``--ways`` measures instead what the ways of sending cost and save, on the same guest: how fast zero pages are told from
others; 1, 2 and 4 connections; packing of text and of noise; a cap, and how well it holds.

``--tls`` measures instead what encryption costs: the first round plain and by TLS, in turn, on one and four
connections; and the CPU time of the plain copy without and with it, at both ends together, which other work on the host
does not change.

``--changes`` measures what packing and ``--delta-cache`` save on a slow wire: a hash table of 32 MiB under updates
(``kv``, as fast as it can) moves under the policy ``converge`` over a wire of 10 and of 40 MiB/s.
"""

import argparse
import contextlib
import json
import mmap
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pageferry.core.errors import MigrationError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hostmem import MADV_POPULATE_WRITE
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import page_words, zero_pages
from pageferry.core.policies import ConvergePolicy, XenPolicy
from pageferry.core.vm import VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.options import DEFAULT_WIRE, MigrationOptions, WireOptions
from pageferry.engine.source import Source
from pageferry.engine.wire.acceptor import Acceptor
from pageferry.engine.wire.channel import Channel, Endpoint
from pageferry.engine.wire.credentials import Credentials, new_secret
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.stream.ferry_order import Side
from pageferry.stream.format import MAX_PAGES_PER_RECORD
from pageferry.stream.packing import Packing, available
from pageferry.vmm.accel import Accel, choose_machines

PIECE_BYTES = 4 << 20
CHANGES_MEMORY_BYTES, CHANGES_WORKING_SET_BYTES, CHANGES_CACHE_BYTES = 256 << 20, 32 << 20, 64 << 20
CHANGES_CAPS = (10 << 20, 40 << 20)
#: So long the hash table fills before it moves.
CHANGES_WARM_UP_S = 3.0


def fill(memory: GuestMemory, first_byte: int) -> None:
    """Give every page from ``first_byte`` on its own content, which no packing makes smaller."""
    view = np.frombuffer(memory.mapping.view, np.uint64)[first_byte // 8 : memory.size_bytes // 8]
    view[:] = np.arange(view.size, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)


def fill_with_text(memory: GuestMemory, first_byte: int) -> None:
    """Give every page from ``first_byte`` on lines of text, each with a number of its own."""
    lines = "".join(
        f"{number * 7919 % 100_003:>7} a line of a log that says what happened\n" for number in range(100_000)
    )
    text = np.frombuffer(lines.encode(), np.uint8)
    view = np.frombuffer(memory.mapping.view, np.uint8)[first_byte : memory.size_bytes]
    for at in range(0, view.size, text.size):
        view[at : at + text.size] = text[: view.size - at]


def touch_receiver(pipe: Connection, size_bytes: int) -> None:
    """Touch so much memory and give it back: what a virtual host has touched lately it hands out faster."""
    with mmap.mmap(-1, size_bytes) as memory:
        memory.madvise(MADV_POPULATE_WRITE)
    pipe.send(None)


def plain_receiver(pipe: Connection, size_bytes: int) -> None:
    loopback = Endpoint(host="127.0.0.1")
    with loopback.listen() as listener:
        pipe.send(loopback.bound(listener))
        channel = Channel(listener.accept())
        view = memoryview(mmap.mmap(-1, size_bytes))  # a file in memory, as a guest's memory is, and without its hole
        for at in range(0, size_bytes, PIECE_BYTES):
            channel.receive_into([view[at : min(at + PIECE_BYTES, size_bytes)]])
        channel.send([b"."])
        channel.close()


def plain_copy(size_bytes: int) -> float:
    """Return the seconds that the plain copy took, from connect to the receiver's last word."""
    view = memoryview(mmap.mmap(-1, size_bytes))
    np.frombuffer(view, np.uint64)[:: PAGE_SIZE // 8] = 1
    with Child(touch_receiver, size_bytes):
        pass
    with Child(plain_receiver, size_bytes) as endpoint:
        began_s = time.perf_counter()
        channel = endpoint.connect(30)
        for at in range(0, size_bytes, PIECE_BYTES):
            channel.send([view[at : min(at + PIECE_BYTES, size_bytes)]])
        if channel.receive_some(1) != b".":
            raise RuntimeError("the receiver did not finish")
        took_s = time.perf_counter() - began_s
        channel.close()
    return took_s


def migration_receiver(pipe: Connection, accel: str, secret: str | None = None) -> None:
    machines = choose_machines(Accel(accel))
    credentials = None if secret is None else Credentials.from_secret(secret, Side.DESTINATION)
    with Acceptor("tcp://127.0.0.1:0" if secret is None else "tls://127.0.0.1:0", credentials=credentials) as acceptor:
        pipe.send(acceptor.endpoint)
        with contextlib.suppress(MigrationError):  # the source tells why
            vm = Destination(acceptor.wait(), machines.make_vm, accept=acceptor.accept).run()
            pipe.recv()
            vm.close()


def migration(
    size_bytes: int,
    accel: str,
    wire: WireOptions = DEFAULT_WIRE,
    content: Callable[[GuestMemory, int], None] = fill,
    *,
    tls: bool = False,
) -> tuple[float, dict[str, Any]]:
    """Return the seconds that a migration took, and its report."""
    secret = new_secret() if tls else None
    credentials = None if secret is None else Credentials.from_secret(secret, Side.SOURCE)
    vm = choose_machines(Accel(accel)).make_vm(VmConfig(memory_bytes=size_bytes))
    boot(vm, load_workload("idle"))
    content(vm.memory, 2 << 20)
    with Child(touch_receiver, 2 * size_bytes):
        pass
    with Child(migration_receiver, accel, secret) as endpoint:
        vm.resume()
        source = Source(vm, endpoint, XenPolicy(), MigrationOptions(wire=wire, credentials=credentials))
        report = source.run()
    vm.close()
    return report.total_s, report.to_json()


class Child:
    """A process of its own that tells where it listens, or that it is done."""

    def __init__(self, target: Callable[..., None], *arguments: int | str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments))

    def __enter__(self) -> Any:  # noqa: ANN401  # what it tells
        self._process.start()
        return self._pipe.recv()

    def heard(self) -> Any:  # noqa: ANN401  # what it tells then
        """Return what it tells next."""
        return self._pipe.recv()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self._pipe.send(None)
        self._process.join()


def zero_scan(size_bytes: int, content: Callable[[GuestMemory, int], None]) -> float:
    """Return how fast zero pages are told from others, in bytes a second: the best of three."""
    memory = GuestMemory.linear(size_bytes)
    memory.populate(np.array([0], np.uint64), np.array([memory.pages], np.uint64))
    content(memory, 0)
    words, gfns = page_words(memory), np.arange(memory.pages, dtype=np.uint64)
    times_s = []
    for _ in range(3):
        began_s = time.perf_counter()
        for at in range(0, gfns.size, MAX_PAGES_PER_RECORD):
            zero_pages(words, gfns[at : at + MAX_PAGES_PER_RECORD])
        times_s.append(time.perf_counter() - began_s)
    return size_bytes / min(times_s)


def nothing(memory: GuestMemory, first_byte: int) -> None:
    """Leave memory zero."""


def ways(size_bytes: int, accel: str, repeats: int) -> dict[str, Any]:
    """Return what each way of sending made of the same memory: medians of so many migrations each, in turn."""
    cap = 256 << 20
    cases: dict[str, tuple[WireOptions, Callable[[GuestMemory, int], None]]] = {
        "1 connection": (DEFAULT_WIRE, fill),
        "2 connections": (WireOptions(connections=2), fill),
        "4 connections": (WireOptions(connections=4), fill),
        "zero pages": (DEFAULT_WIRE, nothing_but_storage),
        f"cap of {cap >> 20} MiB/s": (WireOptions(bandwidth_bytes_per_s=cap), fill),
    }
    for packing in available():
        cases[f"{packing}, text"] = (WireOptions(compress=packing), fill_with_text)
        cases[f"{packing}, noise"] = (WireOptions(compress=packing), fill)
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (wire, content) in cases.items():
            _, report = migration(size_bytes, accel, wire, content)
            runs[name].append((report["rounds"][0]["duration_s"], report["rounds"][0]["sent_bytes"]))
    result = {
        name: {
            "memory_bytes_per_s": size_bytes / statistics.median(duration_s for duration_s, _ in each),
            "wire_bytes_per_s": statistics.median(sent / duration_s for duration_s, sent in each),
            "wire_share": statistics.median(sent for _, sent in each) / size_bytes,
        }
        for name, each in runs.items()
    }
    scans = {"scan of zero pages": nothing, "scan of others": fill}
    return result | {name: {"memory_bytes_per_s": zero_scan(size_bytes, how)} for name, how in scans.items()}


def copy_receiver(pipe: Connection, size_bytes: int, secret: str | None) -> None:
    loopback = Endpoint(host="127.0.0.1")
    with loopback.listen() as listener:
        pipe.send(loopback.bound(listener))
        channel = Channel(listener.accept())
        if secret is not None:
            channel.secure(Credentials.from_secret(secret, Side.DESTINATION).context)
        view = memoryview(mmap.mmap(-1, PIECE_BYTES))
        channel.receive_into([view])
        began_s = time.process_time()
        for _ in range(size_bytes // PIECE_BYTES):
            channel.receive_into([view])
        pipe.send(time.process_time() - began_s)
        channel.close()


def cpu_of_copy(size_bytes: int, *, tls: bool) -> float:
    """Return the CPU seconds that both ends together take to move so much from one piece of memory into another."""
    secret = new_secret() if tls else None
    child = Child(copy_receiver, size_bytes, secret)
    with child as endpoint:
        channel = endpoint.connect(30)
        if secret is not None:
            credentials = Credentials.from_secret(secret, Side.SOURCE)
            channel.secure(credentials.context, server_name=credentials.peer)
        view = memoryview(bytearray(PIECE_BYTES))
        channel.send([view])
        began_s = time.process_time()
        for _ in range(size_bytes // PIECE_BYTES):
            channel.send([view])
        took_s = time.process_time() - began_s + child.heard()
        channel.close()
    return took_s


def encryption(size_bytes: int, accel: str, repeats: int) -> dict[str, Any]:
    """Return what TLS costs on one and on four connections, each pair in turn, and what CPU time it takes."""
    cpu = [[cpu_of_copy(size_bytes, tls=tls) for tls in (False, True)] for _ in range(repeats)]
    result: dict[str, Any] = {
        "cpu": {
            "plain_s_per_gib": statistics.median(plain for plain, _ in cpu) * (1 << 30) / size_bytes,
            "tls_s_per_gib": statistics.median(tls for _, tls in cpu) * (1 << 30) / size_bytes,
        }
    }
    for connections in (1, 4):
        wire = WireOptions(connections=connections)
        runs = [[migration(size_bytes, accel, wire, tls=tls)[1] for tls in (False, True)] for _ in range(repeats)]
        rounds = [[report["rounds"][0]["duration_s"] for report in pair] for pair in runs]
        result[f"{connections} connection{'s' if connections > 1 else ''}"] = {
            "plain_bytes_per_s": size_bytes / statistics.median(plain for plain, _ in rounds),
            "tls_bytes_per_s": size_bytes / statistics.median(tls for _, tls in rounds),
            "ratio_median": statistics.median(plain / tls for plain, tls in rounds),
            "ratio_min": min(plain / tls for plain, tls in rounds),
            "ratio_max": max(plain / tls for plain, tls in rounds),
            "downtime_plain_s": statistics.median(plain["downtime_s"] for plain, _ in runs),
            "downtime_tls_s": statistics.median(tls["downtime_s"] for _, tls in runs),
        }
    return result


def changes(accel: str, repeats: int) -> dict[str, Any]:
    """Return what a busy guest's migration took over a slow wire, by cap and way: medians of those that ended well."""
    packings = [(packing, cache) for packing in available() for cache in (0, CHANGES_CACHE_BYTES)]
    result = {}
    for cap in CHANGES_CAPS:
        for packing, cache in [(Packing.NONE, 0), *packings]:
            wire = WireOptions(bandwidth_bytes_per_s=cap, compress=packing, delta_cache_bytes=cache)
            runs = [changing_migration(accel, wire) for _ in range(repeats)]
            moved = [run for run in runs if run["status"] == "completed"]
            result[f"{cap >> 20} MiB/s, {packing}{', cache' if cache else ''}"] = {
                "moved": len(moved),
                **{
                    name: statistics.median(run[name] for run in moved) if moved else None
                    for name in ("total_s", "sent_bytes", "throttled_s", "downtime_s")
                },
            }
    return result


def changing_migration(accel: str, wire: WireOptions) -> dict[str, Any]:
    """Return the report of one migration of a guest that changes its pages all the time, done or given up."""
    vm = choose_machines(Accel(accel)).make_vm(VmConfig(memory_bytes=CHANGES_MEMORY_BYTES))
    boot(vm, load_workload("kv"), params=GuestParams(working_set_bytes=CHANGES_WORKING_SET_BYTES))
    with Child(migration_receiver, accel) as endpoint:
        vm.resume()
        time.sleep(CHANGES_WARM_UP_S)
        source = Source(vm, endpoint, ConvergePolicy(), MigrationOptions(wire=wire))
        with contextlib.suppress(MigrationError):  # the report tells that its policy gave up
            source.run()
    vm.close()
    if source.job.report is None:
        raise RuntimeError("a migration left no report")
    return source.job.report.to_json()


def nothing_but_storage(memory: GuestMemory, first_byte: int) -> None:
    """Give every page storage, and leave it zero."""
    first, pages = first_byte >> 12, (memory.size_bytes - first_byte) >> 12
    memory.populate(np.array([first], np.uint64), np.array([pages], np.uint64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="256 MiB and two pairs instead of 1 GiB and five")
    parser.add_argument("--ways", action="store_true", help="connections, packing, zero pages and a cap instead")
    parser.add_argument("--changes", action="store_true", help="packing and the delta cache on a slow wire instead")
    parser.add_argument("--tls", action="store_true", help="TLS against none, on one and four connections instead")
    parser.add_argument("--accel", default="auto", choices=["auto", "kvm", "soft"])
    options = parser.parse_args()
    size_bytes, pairs = (256 << 20, 2) if options.quick else (1 << 30, 5)
    accel = choose_machines(Accel(options.accel)).accel
    if options.changes:
        found = changes(accel, 1 if options.quick else 3)
        if options.json:
            json.dump(found, sys.stdout, indent=2)
            print()
            return
        print(f"{accel}, kv of {CHANGES_WORKING_SET_BYTES >> 20} MiB, policy converge, medians")
        for name, each in found.items():
            if not each["moved"]:
                print(f"  {name:<24} given up")
                continue
            print(
                f"  {name:<24}{each['total_s']:6.2f} s, {each['sent_bytes'] / 2**20:6.1f} MiB, "
                f"throttled for {each['throttled_s']:5.2f} s, {each['downtime_s'] * 1e3:5.0f} ms down"
            )
        return
    if options.tls:
        found = encryption(size_bytes, accel, pairs)
        if options.json:
            json.dump(found, sys.stdout, indent=2)
            print()
            return
        print(f"{accel}, {size_bytes >> 20} MiB, the first round of {pairs} pairs, medians")
        cpu = found.pop("cpu")
        print(f"  CPU time, both ends: {cpu['plain_s_per_gib']:.2f} s a GiB plain, {cpu['tls_s_per_gib']:.2f} by TLS")
        for name, each in found.items():
            plain, tls = each["plain_bytes_per_s"] / 1e9, each["tls_bytes_per_s"] / 1e9
            print(
                f"  {name:<14}{plain:5.2f} GB/s plain, {tls:5.2f} by TLS: "
                f"ratio {each['ratio_median']:.2f} ({each['ratio_min']:.2f} to {each['ratio_max']:.2f}); "
                f"down {each['downtime_plain_s'] * 1e3:.0f} and {each['downtime_tls_s'] * 1e3:.0f} ms"
            )
        return
    if options.ways:
        found = ways(size_bytes, accel, pairs)
        if options.json:
            json.dump(found, sys.stdout, indent=2)
            print()
            return
        print(f"{accel}, {size_bytes >> 20} MiB, the first round of {pairs} migrations each, medians")
        for name, each in found.items():
            line = f"  {name:<22}{each['memory_bytes_per_s'] / 2**30:6.2f} GiB/s of memory"
            if "wire_share" in each:
                line += f", {each['wire_bytes_per_s'] / 2**20:7.1f} MiB/s on the wire, {each['wire_share']:6.1%} of it"
            print(line)
        return

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
