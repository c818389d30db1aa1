"""Shadow paging against nested paging (HAP), in the software hypervisor, on two guests.

* `pagetables`, page-table-heavy: it remaps pages in its own page tables, two TLB flushes every 16 operations.
* `sweep`, data-heavy: it writes one page after the other, and its page tables never change.

Each runs with log-dirty off, and again with CLEAN every 20 ms. Work is the guest's own count, per second; faults are
nested page faults (write faults that log-dirty counts), fills and walks are what the modes do besides. The numbers of
one row come from one run; modes alternate, so that a slow minute hits both.
"""

import argparse
import json
import statistics
import sys
import time

from pageferry.core.vm import VmConfig
from pageferry.guests.abi import read_status
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain

COLUMNS = ("work/s", "nested faults/s", "shadow faults/s", "table writes/s", "dirty/round", "CLEAN")
MODES = ("hap", "shadow")
GUESTS = {"pagetables": 4 << 20, "sweep": 32 << 20}
MEMORY_BYTES = 64 << 20
CLEAN_EVERY_S = 0.02

REASONS = {
    ("pagetables", "off"): "shadow performs each write to a guest table, and faults again on what it dropped;\n"
    "HAP lets the guest write its tables freely and only walks after each flush",
    ("pagetables", "on"): "the same; the faults of log-dirty come on top, in both",
    ("sweep", "off"): "no table changes: a TLB miss is one walk of the shadows, or one nested walk with a cached\n"
    "upper part; the guest lives in its TLB in both",
    ("sweep", "on"): "each fault does what HAP's does (mark, P2M type) and sets W in the shadows too. CLEAN is mostly\n"
    "waiting for the vCPU, which stops after a fixed number of instructions, however many of them fault",
}


def measure(guest: str, mode: str, *, log_dirty: bool, duration_s: float) -> dict[str, float]:
    vm = Domain(VmConfig(memory_bytes=MEMORY_BYTES), paging_mode=mode)
    boot(vm, load_workload(guest), params=GuestParams(working_set_bytes=GUESTS[guest]))
    vm.resume()
    while not read_status(vm.memory, 1)[0].work:
        vm.wait(0.001)
    vm.wait(0.05)  # let it touch its working set first
    if log_dirty:
        vm.log_dirty.enable()
    began_s = time.perf_counter()
    work = read_status(vm.memory, 1)[0].work
    shadow_faults, emulated = vm.shadow.fault_count, vm.shadow.emulated_writes
    rounds = dirty = 0
    clean_s = 0.0
    while time.perf_counter() - began_s < duration_s:
        vm.wait(CLEAN_EVERY_S)
        if log_dirty:
            before_s = time.perf_counter()
            dirty += vm.log_dirty.clean().count()
            clean_s += time.perf_counter() - before_s
            rounds += 1
    work = read_status(vm.memory, 1)[0].work - work
    elapsed_s = time.perf_counter() - began_s
    result = {
        "work_per_s": work / elapsed_s,
        "nested_faults_per_s": (vm.log_dirty.stats().fault_count or 0) / elapsed_s if log_dirty else 0.0,
        "shadow_faults_per_s": (vm.shadow.fault_count - shadow_faults) / elapsed_s,
        "table_writes_per_s": (vm.shadow.emulated_writes - emulated) / elapsed_s,
        "dirty_pages_per_round": dirty / rounds if rounds else 0.0,
        "clean_s": clean_s / rounds if rounds else 0.0,
    }
    vm.close()
    return result


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    times, duration_s = (1, 0.5) if options.quick else (5, 2.0)
    rows = []
    for guest in GUESTS:
        for log_dirty in (False, True):
            runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
            for _ in range(times):
                for mode in MODES:
                    runs[mode].append(measure(guest, mode, log_dirty=log_dirty, duration_s=duration_s))
            found = {mode: medians(runs[mode]) for mode in MODES}
            cost = found["hap"]["work_per_s"] / found["shadow"]["work_per_s"]
            rows.append({"guest": guest, "log_dirty": "on" if log_dirty else "off", **found, "cost_of_shadow": cost})
    if options.json:
        json.dump({"rows": rows, "memory_bytes": MEMORY_BYTES, "working_set_bytes": GUESTS}, sys.stdout, indent=2)
        print()
        return
    print("guest       log-dirty  mode   {:>13} {:>16} {:>16} {:>15} {:>12} {:>9}".format(*COLUMNS))
    for row in rows:
        for mode in MODES:
            m = row[mode]
            print(
                f"{row['guest']:<11} {row['log_dirty']:<9}  {mode:<6} {m['work_per_s']:13,.0f} "
                f"{m['nested_faults_per_s']:16,.0f} {m['shadow_faults_per_s']:16,.0f} {m['table_writes_per_s']:15,.0f} "
                f"{m['dirty_pages_per_round']:12,.0f} {m['clean_s'] * 1e6:6,.0f} µs"
            )
        why = REASONS[row["guest"], row["log_dirty"]].replace("\n", "\n    ")
        print(f"    HAP does {row['cost_of_shadow']:.2f} times the work of shadow: {why}")


if __name__ == "__main__":
    main()
