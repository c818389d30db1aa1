"""The software hypervisor's hot paths: CLEAN, the nested page fault, plain execution.

* CLEAN with 1,000 dirty pages on a sparse 64 GiB guest against a 256 MiB one (target: at most twice the time), and
  ENABLE (the same target), PEEK, OFF (which joins superpages again) and making the domain beside it.
* Nested page faults per second: a guest that sweeps 64 MiB while CLEAN is called every 20 ms.
* Guest instructions per second: a loop of two instructions, log-dirty off.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.state import MachineState
from pageferry.core.vm import VmConfig
from pageferry.guests.abi import PAGE_TABLES_GPA, PROGRAM_BASE, entry_state, page_tables
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain

DIRTY_PAGES = 1000
SIZES_BYTES = (256 << 20, 16 << 30, 64 << 30)
LOOP = bytes.fromhex("48ffc3ebfb")  # inc rbx; jmp back


def median_s(times: int, action: Callable[[], float]) -> float:
    return statistics.median(action() for _ in range(times))


def timed(action: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    action()
    return time.perf_counter() - began_s


def operators(memory_bytes: int, times: int) -> dict[str, float]:
    """Return median seconds of each operator with the dirty pages spread over all of memory, and of making a domain."""

    def create() -> float:
        made: list[Domain] = []
        took_s = timed(lambda: made.append(Domain(VmConfig(memory_bytes=memory_bytes))))
        made[0].close()
        return took_s

    create_s = median_s(5, create)
    vm = Domain(VmConfig(memory_bytes=memory_bytes))
    all_gfns = vm.memory.all_ram().gfns()
    gfns = all_gfns[:: all_gfns.size // DIRTY_PAGES][:DIRTY_PAGES].tolist()
    log_dirty = vm.paging

    def make_dirty() -> None:
        for gfn in gfns:
            log_dirty.fix_and_mark(gfn)

    def enable() -> float:
        log_dirty.off()
        return timed(log_dirty.enable)

    def off() -> float:
        make_dirty()
        took_s = timed(log_dirty.off)
        log_dirty.enable()
        return took_s

    def clean() -> float:
        make_dirty()
        kept: list[DirtyBitmap] = []  # freeing the bitmap is its new owner's business
        return timed(lambda: kept.append(log_dirty.clean()))

    def peek() -> float:
        make_dirty()
        took_s = timed(log_dirty.peek)
        log_dirty.clean()
        return took_s

    operations = {"enable_s": enable, "clean_s": clean, "peek_s": peek, "off_s": off}
    result = {name: median_s(times, action) for name, action in operations.items()}
    vm.close()
    return result | {"create_s": create_s}


def faults_per_s(duration_s: float) -> float:
    vm = Domain(VmConfig(memory_bytes=128 << 20))
    boot(vm, load_workload("sweep"), params=GuestParams(working_set_bytes=64 << 20))
    vm.log_dirty.enable()
    vm.resume()
    began_s = time.perf_counter()
    while (elapsed_s := time.perf_counter() - began_s) < duration_s:
        vm.wait(0.02)
        vm.log_dirty.clean()
    faults = vm.log_dirty.stats().fault_count or 0
    vm.close()
    return faults / elapsed_s


def instructions_per_s(duration_s: float) -> float:
    vm = Domain(VmConfig(memory_bytes=16 << 20))
    vm.memory.write(PAGE_TABLES_GPA, page_tables(16 << 20))
    vm.memory.write(PROGRAM_BASE, LOOP)
    vm.load_state(MachineState(vcpus=(replace(entry_state(PROGRAM_BASE, 0), rbx=0),), devices=vm.platform.bus.save()))
    began_s = time.perf_counter()
    vm.resume()
    vm.wait(duration_s)
    vm.pause()
    elapsed_s = time.perf_counter() - began_s
    count = 2 * vm.save_state().vcpus[0].rbx
    vm.close()
    return count / elapsed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    times, duration_s = (7, 0.5) if options.quick else (41, 3.0)
    sizes = [operators(memory_bytes, times) for memory_bytes in SIZES_BYTES]
    small, large = sizes[0], sizes[-1]
    result = {
        "sizes_bytes": SIZES_BYTES,
        "dirty_pages": DIRTY_PAGES,
        "operators": sizes,
        "ratios": {name: large[name] / small[name] for name in small},
        "faults_per_s": faults_per_s(duration_s),
        "instructions_per_s": instructions_per_s(duration_s),
    }
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{DIRTY_PAGES} dirty pages   256 MiB       16 GiB       64 GiB   ratio")
    for name in small:
        columns = " ".join(f"{size[name] * 1e6:9.0f} µs" for size in sizes)
        print(f"  {name[:-2]:<10} {columns}   {large[name] / small[name]:5.2f}")
    print(f"nested page faults  {result['faults_per_s']:12,.0f} a second")
    print(f"guest instructions  {result['instructions_per_s']:12,.0f} a second")


if __name__ == "__main__":
    main()
