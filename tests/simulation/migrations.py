"""``make simulate``: whole migrations on simulated hosts, with faults and commands drawn by a seed.

    python -m simulation.migrations [--seed N] [--count N]

Both ends are the engine's, from the first connect to DROPPED; clock, threads, network and guest are simulated
(:mod:`.simulated_host`, :mod:`.simulated_network`, :mod:`.simulated_guest`). A run draws how the guest is to be moved,
what goes wrong, and what people ask for meanwhile (:mod:`.troubles`). Then the troubles end, and somebody does what
pageferry says is to be done, until it is known where the guest is (:mod:`.simulated_run`). In each run must hold:

* At no time do two machines run the guest.
* In the end one machine has it, unless a process was killed that had it or a part of it, or it was given up.
* It has all that it wrote.
* Where each end says that the guest is, there it is.
* It can be moved again.
* No thread, connection or machine is left.

Run number ``i`` of ``--seed N`` is the same as the first of ``--seed N+i``.
"""

import argparse
import faulthandler
import multiprocessing
import os
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import Queue

from simulation.simulated_run import Run
from simulation.troubles import Kind

DEFAULT_COUNT = 10_000
#: A process does so many runs at a time; when they take longer than this, on the real clock, one of them hangs.
_PART, _HANGS_S = 50, 600.0


def simulate(seed: int, kind: Kind | None = None) -> dict[str, int]:
    """Do one run; return what happened in it, each with 1, and how often threads took turns.

    Raises:
        Exception: it failed; its notes tell what happened.
    """
    run = Run(seed, kind)
    try:
        run.run()
    except Exception as error:
        error.add_note("\n".join(run.log))
        raise
    return run.seen | {"turns": run.simulation.turns}


def simulate_some(seeds: range) -> tuple[Counter[str], dict[int, str]]:
    """Do a few runs; return what happened, and what became of those that failed."""
    seen: Counter[str] = Counter()
    failed = {}
    for seed in seeds:
        try:
            seen.update(simulate(seed))
        except Exception as error:
            failed[seed] = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return seen, failed


def _simulate_part(seeds: range) -> tuple[Counter[str], dict[int, str]]:
    faulthandler.dump_traceback_later(_HANGS_S, exit=True)
    try:
        return simulate_some(seeds)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _take_a_cpu(numbers: Queue) -> None:
    # Handing over between threads of one CPU costs a third of what it costs between two.
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[numbers.get() % len(cpus)]})


def main(arguments: Sequence[str] | None = None) -> int:
    """Do so many runs, on all CPUs; return the exit code: 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m simulation.migrations", description="Migrate, simulated.")
    parser.add_argument("--seed", type=int, help="of the first run; each has the next (default: another each time)")
    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="how many runs (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count must be at least 1")
    first = secrets.randbits(32) if options.seed is None else options.seed
    print(f"simulate: seed {first}, {options.count} runs", flush=True)
    seeds = range(first, first + options.count)
    parts = [seeds[at : at + _PART] for at in range(0, options.count, _PART)]
    seen: Counter[str] = Counter()
    failed: dict[int, str] = {}
    context = multiprocessing.get_context("spawn")
    workers, numbers = len(os.sched_getaffinity(0)), context.Queue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(workers, context, _take_a_cpu, (numbers,)) as pool:
        for some, more in pool.map(_simulate_part, parts):
            seen.update(some)
            failed.update(more)
            for seed, what in more.items():
                print(f"FAILED: make simulate SEED={seed} COUNT=1\n{what}\n", flush=True)
    print("\n".join(f"{count:8} {what}" for what, count in sorted(seen.items(), key=lambda each: -each[1])))
    print(f"simulate: {options.count} runs from seed {first}, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
