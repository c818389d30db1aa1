"""The six dirty trackers beside each other: what each operator costs, and what the guest loses meanwhile.

*Operators*: a guest of 1 GiB that has touched 32 MiB of it writes each of those pages once per round and stops. Timed
are ENABLE; a round right after CLEAN against the next one, which faults no more: the cost of the first write to a page;
CLEAN when nothing is dirty, per GiB; CLEAN of the whole working set, what it takes beyond that, per dirty page; PEEK.
The guest stands still during each operator.

*Workloads*: each built-in guest, with a working set of at most 4 MiB, for a while without log-dirty and for a while
with it and a CLEAN every 100 ms. What is shown is the work done per second with it, as a share of the work without it,
of the same machine just before.

Trackers alternate, so that a slow minute hits all of them. Shown are medians, and the smallest..largest value seen.
Operators cost processor time. For the guest's time, what its vCPUs had to wait for a busy processor of the host is not
counted; that uffd-wp's handler has to wait for one is part of its cost, so a busy host makes it look worse.
A tracker that does not work here gets a row that says what is missing; without KVM that is four of them.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from machines import KINDS, Kind, expect_works

from _trackers_plot import Spread, draw, plot_path
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.machine import Machine
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.guests.abi import read_status
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import WORKLOADS, load_workload

MEMORY_BYTES = 1 << 30
TOUCHED_BYTES = 32 << 20
WORKLOAD_MEMORY_BYTES = 64 << 20
WORKING_SET_BYTES = 4 << 20
ROUND_S = 0.1
PATIENCE_S = 120.0
KEPT = f"share of its speed that a guest keeps, CLEAN every {ROUND_S * 1e3:.0f} ms"
#: Where the kernel tells how long a thread was ready to run and did not.
SCHEDSTAT = Path("/proc/self/schedstat")

#: Name in the results, heading, unit, how many of it are a second.
COSTS = (
    ("enable_s", "ENABLE", "ms", 1e3),
    ("first_write_s", "first write", "µs", 1e6),
    ("clean_s_per_gib", "CLEAN per GiB", "ms", 1e3),
    ("clean_s_per_page", "per dirty page", "ns", 1e9),
    ("peek_s", "PEEK", "ms", 1e3),
)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def timed(action: Callable[[], object]) -> float:
    began_s = time.thread_time()
    action()
    return time.thread_time() - began_s


def guest_clock_s(vm: Machine) -> float:
    """Return the seconds of a clock that stands still while the guest's vCPUs wait for a processor of the host."""
    waited_ns = 0
    for thread in threading.enumerate() if SCHEDSTAT.exists() else ():
        if "vcpu" in thread.name:
            waited_ns += int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[1])
    return time.perf_counter() - waited_ns / vm.config.cpus / 1e9


def offered_kinds() -> tuple[list[Kind], dict[str, str]]:
    """Return the kinds of machine that work here, and of each other tracker what is missing."""
    working, missing = [], {}
    for kind in KINDS:
        try:
            expect_works(kind)
        except (UnsupportedError, VmError) as error:
            missing[kind.tracker] = str(error)
        else:
            working.append(kind)
    return working, missing


@contextmanager
def guests(kinds: Sequence[Kind], workload: str, config: VmConfig, params: GuestParams) -> Iterator[dict[str, Machine]]:
    """Boot the same guest once under each tracker; it is paused."""
    with ExitStack() as machines:
        made = {}
        for kind in kinds:
            vm = made[kind.tracker] = kind.make_vm(config)
            machines.callback(vm.close)
            boot(vm, load_workload(workload), params=params)
        yield made


def run_to_sync_point(vm: Machine) -> float:
    """Let a ``stamp`` guest play one round; return how long it took."""
    if (before := vm.sync_value()) is not None:
        vm.reply_sync(before + 1)
    began_s = guest_clock_s(vm)
    vm.resume()
    vm.wait(PATIENCE_S)
    took_s = guest_clock_s(vm) - began_s
    if vm.status is not VmStatus.PAUSED:
        raise RuntimeError(f"the guest did not end its round: {vm.status}, {vm.end}")
    return took_s


def operators_once(vm: Machine) -> dict[str, float]:
    """Measure every operator of one tracker once; log-dirty is off before and after."""
    log, pages = vm.log_dirty, TOUCHED_BYTES // PAGE_SIZE
    for _ in range(2):  # whatever the last OFF has left protected is written
        run_to_sync_point(vm)
    enable_s = timed(log.enable)
    log.clean()
    idle_s = statistics.median(timed(log.clean) for _ in range(5))
    faulting_s = run_to_sync_point(vm)
    peek_s = timed(log.peek)
    writable_s = run_to_sync_point(vm)
    dirty_pages = log.peek().count()
    clean_s = timed(log.clean)
    log.off()
    if dirty_pages < pages:
        raise RuntimeError(f"{log.tracker} reports {dirty_pages} pages dirty of {pages} written")
    return {
        "enable_s": enable_s,
        "first_write_s": (faulting_s - writable_s) / pages,
        "clean_s_per_gib": idle_s * (1 << 30) / MEMORY_BYTES,
        "clean_s_per_page": (clean_s - idle_s) / dirty_pages,
        "peek_s": peek_s,
    }


def measure_operators(kinds: Sequence[Kind], times: int) -> dict[str, dict[str, Spread]]:
    runs: dict[str, list[dict[str, float]]] = {kind.tracker: [] for kind in kinds}
    params = GuestParams(working_set_bytes=TOUCHED_BYTES, arguments=(256,))  # 256 in 256: every page in every round
    with guests(kinds, "stamp", VmConfig(memory_bytes=MEMORY_BYTES), params) as machines:
        for vm in machines.values():
            vm.attach_sync(True)
            run_to_sync_point(vm)
        for number in range(times):
            for tracker, vm in machines.items():
                say(f"operators, {number + 1} of {times}: {tracker}")
                runs[tracker].append(operators_once(vm))
    return {
        tracker: {name: Spread.of([run[name] for run in found]) for name, *_ in COSTS}
        for tracker, found in runs.items()
    }


def work_of(vm: Machine) -> int:
    if vm.end is not None:
        raise RuntimeError(f"the guest has ended: {vm.end}")
    return sum(slot.work for slot in read_status(vm.memory, vm.config.cpus))


def work_per_s(vm: Machine, rounds: int, *, clean: bool) -> float:
    """Return the work that a guest does per second in so many rounds, or in as many as it needs to do any.

    It is paused before and after: a thread that waits for a processor would not have been charged for that yet.
    """
    began_s, before, number = guest_clock_s(vm), work_of(vm), 0
    give_up_s = time.perf_counter() + PATIENCE_S
    vm.resume()
    while number < rounds or work_of(vm) == before:
        if time.perf_counter() > give_up_s:
            raise RuntimeError(f"the guest does nothing: {vm.status}")
        number += 1
        while (left_s := began_s + number * ROUND_S - guest_clock_s(vm)) > 0:
            vm.wait(max(left_s, 0.001))
        if clean:
            vm.log_dirty.clean()
    vm.pause()
    return (work_of(vm) - before) / (guest_clock_s(vm) - began_s)


def kept_once(vm: Machine, rounds: int) -> float:
    """Return the share of its speed that a guest keeps under log-dirty; it is paused before and after."""
    work_per_s(vm, 1, clean=False)  # it touches what it will, and writes what the last OFF has left protected
    alone = work_per_s(vm, rounds, clean=False)
    vm.log_dirty.enable()
    tracked = work_per_s(vm, rounds, clean=True)
    vm.log_dirty.off()
    return tracked / alone


def measure_workloads(kinds: Sequence[Kind], pairs: int, rounds: int) -> dict[str, dict[str, Spread]]:
    """Return for each workload and tracker the share of its speed that the guest keeps."""
    kept: dict[str, dict[str, Spread]] = {}
    for number, (name, workload) in enumerate(WORKLOADS.items(), start=1):
        say(f"workloads, {number} of {len(WORKLOADS)}: {name}")
        size_bytes = min(WORKING_SET_BYTES, workload.default_working_set_bytes)
        config = VmConfig(memory_bytes=WORKLOAD_MEMORY_BYTES, cpus=2 if name == "smp" else 1)
        shares: dict[str, list[float]] = {kind.tracker: [] for kind in kinds}
        with guests(kinds, name, config, GuestParams(working_set_bytes=size_bytes)) as machines:
            for _ in range(pairs):
                for tracker, vm in machines.items():
                    shares[tracker].append(kept_once(vm, rounds))
        kept[name] = {tracker: Spread.of(found) for tracker, found in shares.items()}
    return kept


def print_tables(
    costs: Mapping[str, Mapping[str, Spread]], kept: Mapping[str, Mapping[str, Spread]], missing: Mapping[str, str]
) -> None:
    print(f"{'':<13}" + "".join(f"{f'{heading}, {unit}':>24}" for _, heading, unit, _ in COSTS))
    for kind in KINDS:
        if (tracker := kind.tracker) in missing:
            print(f"{tracker:<13}  not here: {missing[tracker]}")
            continue
        cells = (_cell(costs[tracker][name], factor) for name, _, _, factor in COSTS)
        print(f"{tracker:<13}" + "".join(f"{cell:>24}" for cell in cells))
    print(f"\n{KEPT}")
    print(f"{'':<13}" + "".join(f"{tracker:>24}" for tracker in costs))
    for workload, row in kept.items():
        print(f"{workload:<13}" + "".join(f"{_cell(row[tracker], 1):>24}" for tracker in costs))


def _cell(spread: Spread, factor: float) -> str:
    values = (value * factor for value in (spread.median, spread.smallest, spread.largest))
    median, smallest, largest = (f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.2g}" for value in values)
    return f"{median} {smallest}..{largest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--plot", type=plot_path, metavar="FILE", help="draw it too: a .png, .svg or .pdf")
    options = parser.parse_args()
    times, pairs, rounds = (1, 1, 2) if options.quick else (5, 3, 2)
    kinds, missing = offered_kinds()
    for tracker, reason in missing.items():
        say(f"{tracker} is left out: {reason}")
    costs = measure_operators(kinds, times)
    kept = measure_workloads(kinds, pairs, rounds)
    if options.plot is not None:
        draw(options.plot, COSTS, costs, kept, title=KEPT)
    if not options.json:
        print_tables(costs, kept, missing)
        return
    result = {
        "memory_bytes": MEMORY_BYTES,
        "touched_bytes": TOUCHED_BYTES,
        "round_s": ROUND_S,
        "operators": {tracker: {name: asdict(one) for name, one in row.items()} for tracker, row in costs.items()},
        "kept": {name: {tracker: asdict(one) for tracker, one in row.items()} for name, row in kept.items()},
        "missing": missing,
    }
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
