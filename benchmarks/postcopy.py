"""Post-copy against pre-copy: the same guest, host and minute, in turn.

The guest writes a random word of a random page as fast as it can, nearly all over its memory: pre-copy cannot converge,
and after the switch nearly every access meets a page that is missing, until most have come. Pre-copy is the
``xen`` policy, which stops after five rounds however much is left; post-copy switches after one. Each is a migration
between two processes over loopback TCP, with everything that a user gets. Told are medians of the repeats: of the whole
migration, of the downtime, and after the switch of the waits for a page (median and 99th percentile of all waits of a
migration) and of the time until all pages were there.
"""

import argparse
import json
import multiprocessing
import statistics
from multiprocessing.connection import Connection
from typing import Any

from pageferry.core.policies import PostcopyPolicy, XenPolicy
from pageferry.core.policy import Policy
from pageferry.core.vm import VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.source import Source
from pageferry.engine.wire.acceptor import Acceptor
from pageferry.guests.abi import read_work
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.vmm.accel import Accel, choose_machines

#: What the guest does not rewrite: its program, stacks and page tables, and some that are never touched.
_REST_BYTES = 16 << 20
POLICIES: dict[str, Policy] = {"pre-copy": XenPolicy(), "post-copy": PostcopyPolicy(max_rounds=1, limit_s=1e-6)}


def receiver(pipe: Connection, accel: str) -> None:
    """Take a guest in, and keep it until told to end."""
    machines = choose_machines(Accel(accel))
    with Acceptor("tcp://127.0.0.1:0") as acceptor:
        pipe.send(acceptor.endpoint)
        vm = Destination(acceptor.wait(), machines.make_vm, accept=acceptor.accept).run()
        pipe.recv()
        vm.close()


def migration(size_bytes: int, accel: str, policy: Policy) -> dict[str, Any]:
    """Return the report of one migration of a guest that has written nearly all pages of its working set."""
    vm = choose_machines(Accel(accel)).make_vm(VmConfig(memory_bytes=size_bytes))
    working_set_bytes = size_bytes - _REST_BYTES
    boot(vm, load_workload("random"), params=GuestParams(working_set_bytes=working_set_bytes))
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=receiver, args=(theirs, accel))
    process.start()
    try:
        vm.resume()
        while read_work(vm.memory, 1) < 8 * (working_set_bytes >> 12):
            vm.wait(0.05)
        report = Source(vm, pipe.recv(), policy).run()
        pipe.send(None)
    finally:
        process.join()
        vm.close()
    return report.to_json()


def median_of(reports: list[dict[str, Any]], *names: str) -> float:
    """Return the median of one number of the reports, by its names from the outside in."""
    values = []
    for report in reports:
        value: Any = report
        for name in names:
            value = value[name]
        values.append(float(value))
    return statistics.median(values)


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accel", default="kvm", choices=["kvm", "soft"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="memory of the guests, in MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for size_mib in options.sizes:
        reports: dict[str, list[dict[str, Any]]] = {name: [] for name in POLICIES}
        for _ in range(options.repeats):
            for name, policy in POLICIES.items():
                reports[name].append(migration(size_mib << 20, options.accel, policy))
        for name, made in reports.items():
            row = {"mib": size_mib, "way": name}
            row |= {field: median_of(made, field) for field in ("total_s", "downtime_s")}
            if made[0]["postcopy"] is not None:
                fields = ("missing_pages", "duration_s", "waits", "median_wait_s", "p99_wait_s", "waited_s")
                row |= {field: median_of(made, "postcopy", field) for field in fields}
            print(json.dumps(row) if options.json else line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    text = f"{row['mib']:>5} MiB  {row['way']:<10} {row['total_s']:6.2f} s, {row['downtime_s'] * 1e3:7.1f} ms down"
    if "waits" not in row:
        return text
    return (
        f"{text}; then {row['missing_pages']:,.0f} pages in {row['duration_s']:.2f} s, {row['waits']:,.0f} waits: "
        f"median {row['median_wait_s'] * 1e3:.2f} ms, p99 {row['p99_wait_s'] * 1e3:.2f} ms, "
        f"{row['waited_s'] * 1e3:.0f} ms in all"
    )


if __name__ == "__main__":
    main()
