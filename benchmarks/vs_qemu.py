"""pageferry against QEMU: the same guest program, the same host, the same minute, in turn.

The guest (`rewrite`) fills memory with words that do not compress and then rewrites a part of it for ever; it checks
what it reads all the way. pageferry runs it by ``pageferry run``; QEMU boots the same machine code by ``-kernel``
(benchmarks/peers). Both are two processes with KVM that are driven by QMP over loopback TCP, with the same downtime
limit (300 ms) and no bandwidth limit; QEMU once with a single stream and once with multifd. Where the guest writes
faster than the wire moves, both may hold it back (`--policy converge`, `auto-converge`).

* total time: from the command until the source says that it is over and the guest works at the destination;
* downtime at the guest: how long the guest's own counter stands still, read from outside, for both alike; and what each
  source reports;
* memory is warm, as hardware has it: all that is free was in use a moment before (benchmarks/peers/warm.py); else a
  virtual machine's host may take seconds to hand it out again, and that is what one measures (`--cold`);
* processor time: of all threads of both processes, those that run vCPUs apart; peak memory: resident, both processes.

Ratios are ours to the better QEMU of the same repetition: the median, and in brackets the least and the most.
Needs /dev/kvm, the right to read the memory of one's own processes, and `apt install qemu-system-x86 binutils`.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pageferry.core.errors import PageferryError, UnsupportedError
from pageferry.core.hostmem import available_bytes
from pageferry.core.units import format_size
from peers.host import host_line
from peers.image import Load
from peers.monitors import Monitor, Pageferry, Qemu, qemu_shim
from peers.move import Move, move
from peers.table import (
    PLAIN_TARGET,
    Spread,
    Targets,
    compare,
    growth_table,
    header,
    lines,
    short_header,
    short_line,
)
from peers.warm import WarmMemory
from wire import plain_copy

_MIB = 1 << 20
_MULTIFD_CHANNELS = 2
_GROW_MIB = (256, 512, 1024, 2048, 4096, 8192)
_GROW_SPARE_MIB = 32
_GROW_ROOM = 3
_LACKING = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is the same in all scenarios: repetitions, downtime limit, more arguments of pageferry's ``migrate``.

    ``warm``: all free memory was in use a moment before. ``quick``: no warm-up, and only what the README shows.
    """

    pairs: int
    limit_s: float
    options: tuple[tuple[str, Any], ...]
    warm: bool
    quick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A guest to move. ``converge``: whether it may be throttled. ``warm``: the targets in warm memory."""

    title: str
    load: Load
    warm: Targets
    converge: bool = False


def _load(memory_mib: int, filled_mib: int, rewritten_mib: int) -> Load:
    return Load(memory_bytes=memory_mib * _MIB, filled_bytes=filled_mib * _MIB, rewritten_bytes=rewritten_mib * _MIB)


SCENARIOS = {
    "busy": Scenario(
        title="1 GiB, 960 MiB filled, 64 MiB rewritten in a loop",
        load=_load(1024, 960, 64),
        warm=Targets(total=0.9, downtime=0.25, cpu=1.0),
    ),
    "idle": Scenario(
        title="8 GiB, 256 MiB filled, idle",
        load=_load(8192, 256, 0),
        warm=Targets(total=0.3, downtime=1.0, cpu=0.6),
    ),
    "hot": Scenario(
        title="2 GiB, 1 GiB filled, 512 MiB of it rewritten faster than the wire moves them",
        load=_load(2048, 1024, 512),
        warm=Targets(total=0.9, downtime=0.5, cpu=1.0),
        converge=True,
    ),
}
#: In memory that the host below must first fetch, of any guest.
COLD = Targets(total=0.5, downtime=0.5, cpu=0.6)
GROWTH = "growth"
_QUICK_PAIRS = 2


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _monitors(scenario: Scenario, shim: bytes, terms: Terms) -> tuple[Monitor, ...]:
    converge, limit_s = scenario.converge, terms.limit_s
    policy = "converge" if converge else "downtime"
    return (
        Pageferry(policy=policy, limit_s=limit_s, options=terms.options),
        Qemu(shim=shim, channels=None, converge=converge, limit_s=limit_s),
        Qemu(shim=shim, channels=_MULTIFD_CHANNELS, converge=converge, limit_s=limit_s),
    )


def _plain_copy(size_bytes: int, warm: WarmMemory | None) -> float:
    if warm is not None:
        warm.hold()
        warm.give_back(_GROW_ROOM * size_bytes)
    return plain_copy(size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Runs scenarios by these terms. The other fields are what it does on this host, and knows of it."""

    terms: Terms
    warm: WarmMemory
    move: Callable[..., Move] = move
    plain_copy: Callable[[int, WarmMemory | None], float] = _plain_copy
    qemu_shim: Callable[[Path], bytes] = qemu_shim
    available_bytes: Callable[[], int | None] = available_bytes

    def run(self, wanted: Sequence[str], largest_mib: int, *, show: bool) -> list[dict[str, Any]]:
        """Run what is wanted, growth up to that size; return all numbers, and print tables if they are to be shown."""
        shim = b""
        if any(name in SCENARIOS for name in wanted):
            with tempfile.TemporaryDirectory(prefix="vs-qemu-") as folder:
                shim = self.qemu_shim(Path(folder))
        if show:
            print(f"Host: {host_line()}\n", flush=True)
        results: list[dict[str, Any]] = []
        for name in sorted(wanted, key=[*SCENARIOS, GROWTH].index):
            if name == GROWTH:
                text, numbers = self.run_growth([mib for mib in _GROW_MIB if mib <= largest_mib])
                text = f"\n{text}"
            else:
                monitors = _monitors(SCENARIOS[name], shim, self.terms)
                text, numbers = self.run_scenario(SCENARIOS[name], monitors)
                if not results:
                    begin = short_header() if self.terms.quick else header([monitor.name for monitor in monitors])
                    text = f"{begin}\n{text}"
            results.append(numbers)
            if show:
                print(text, flush=True)
        return results

    def run_scenario(self, scenario: Scenario, monitors: Sequence[Monitor]) -> tuple[str, dict[str, Any]]:
        """Move the guest by each monitor in turn, after a warm-up; return lines of a table, and all numbers."""
        rows = []
        for number in range(self.terms.quick, self.terms.pairs + 1):
            _say(f"{scenario.title}: {f'repetition {number} of {self.terms.pairs}' if number else 'warm-up'}")
            rows.append([self._attempt(monitor, scenario.load) for monitor in monitors])
        rows = rows[-self.terms.pairs :]
        comparisons = compare(rows, scenario.warm if self.terms.warm else COLD)
        quick = self.terms.quick
        text = short_line(scenario.title, comparisons) if quick else lines(scenario.title, rows, comparisons)
        return text, {
            "scenario": scenario.title,
            "monitors": [monitor.name for monitor in monitors],
            "comparisons": [comparison.to_json() for comparison in comparisons],
            "moves": [[None if each is None else asdict(each) for each in row] for row in rows],
        }

    def _attempt(self, monitor: Monitor, load: Load) -> Move | None:
        try:
            return self.move(monitor, load, warm=self.warm if self.terms.warm else None)
        except UnsupportedError:
            raise
        except PageferryError as error:
            _say(f"  {monitor.name}: {error}")
            return None

    def run_growth(self, sizes_mib: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Move idle guests of growing size that have filled their memory, each against a plain copy; as above."""
        sizes = []
        for memory_mib in sizes_mib:
            load = _load(memory_mib, memory_mib - _GROW_SPARE_MIB, 0)
            available = self.available_bytes()
            if available is not None and available + self.warm.held_bytes < _GROW_ROOM * load.memory_bytes:
                _say(f"{format_size(load.memory_bytes)}: left out, this host has {format_size(available)} available")
                continue
            sizes.append(self._grow(load))
        return growth_table(sizes), {"scenario": GROWTH, "target": PLAIN_TARGET, "sizes": sizes}

    def _grow(self, load: Load) -> dict[str, Any]:
        terms, warm, moves, shares = self.terms, self.warm if self.terms.warm else None, [], []
        for number in range(terms.pairs + 1):
            step = f"repetition {number} of {terms.pairs}" if number else "warm-up"
            _say(f"growth, {format_size(load.memory_bytes)}: {step}")
            plain_s = self.plain_copy(load.filled_bytes, warm)
            moved = self.move(Pageferry(policy="xen", limit_s=None, options=terms.options), load, warm=warm)
            if number:
                moves.append(moved)
                shares.append(plain_s / moved.total_s)
        spreads = {
            name: asdict(Spread.of([getattr(each, name) for each in moves]))
            for name in ("total_s", "gap_s", "verify_s", "cpu_s", "peak_bytes")
        }
        return {"memory_bytes": load.memory_bytes, **spreads, "of_a_copy": asdict(Spread.of(shares))}


def main(arguments: Sequence[str] | None = None, bench: Callable[..., Bench] = Bench) -> int:
    """Compare, with a bench that is made by the terms asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*SCENARIOS, GROWTH]
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"which of {', '.join(known)}; all if none")
    parser.add_argument("--pairs", type=int, help=f"repetitions after the warm-up (default 7; {_QUICK_PAIRS} if quick)")
    parser.add_argument("--quick", action="store_true", help="no warm-up and no growth; prints what the README shows")
    parser.add_argument("--downtime-limit", type=float, default=300.0, metavar="MS", help="of both (default 300)")
    parser.add_argument("--largest", type=int, default=_GROW_MIB[-1], metavar="MIB", help="the last size of growth")
    parser.add_argument(
        "--set",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of pageferry's QMP command migrate, e.g. x-verify=audit; may be repeated",
    )
    parser.add_argument("--cold", action="store_true", help="take memory as the host below hands it out")
    parser.add_argument("--json", action="store_true", help="print one JSON object, all numbers, instead of tables")
    options = parser.parse_args(arguments)
    if unknown := set(options.scenarios) - set(known):
        parser.error(f"unknown scenario {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.quick and GROWTH in options.scenarios:
        parser.error(f"--quick has no {GROWTH}")
    pairs = (_QUICK_PAIRS if options.quick else 7) if options.pairs is None else options.pairs
    if pairs < 1:
        parser.error("at least one pair is needed")
    if not 1 <= options.downtime_limit <= 2_000_000:
        parser.error("the downtime limit is between 1 ms and 2000 s, as QEMU has it")
    terms = Terms(
        pairs=pairs,
        limit_s=options.downtime_limit / 1e3,
        options=tuple(options.set),
        warm=not options.cold,
        quick=options.quick,
    )
    wanted = options.scenarios or (list(SCENARIOS) if options.quick else known)
    try:
        with WarmMemory() as warm:
            results = bench(terms=terms, warm=warm).run(wanted, options.largest, show=not options.json)
    except PageferryError as error:
        _say(f"vs_qemu: {error}; {error.hint}" if error.hint else f"vs_qemu: {error}")
        return _LACKING if isinstance(error, UnsupportedError) else 1
    except KeyboardInterrupt:
        _say("vs_qemu: interrupted; what was started is ended")
        return 130
    if options.json:
        json.dump({"host": host_line(), "terms": asdict(terms), "results": results}, sys.stdout, indent=2)
        print()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
