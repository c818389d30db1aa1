"""``make soak``: guests that go there and back, over machines, trackers, policies, sizes and vCPUs drawn by chance.

    python -m simulation.soak [--seed N] [--count N]

A ``kv`` guest lives through several round trips between two hosts: machines in this process, the real engine over real
sockets. Each migration proves its memory equal, and after it the guest runs until every vCPU has checked its whole
table anew. The seed is printed first, and again with a failure; the same seed draws the same trips (what the guest has
done by then is up to the host's clock).

Ends with 0 when every trip ended well, with 1 at the first that did not. Kinds of machines that do not work on this
host are left out, which is said.
"""

import argparse
import random
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from machines import KINDS, Kind, working
from trips import Inn, source_of

from pageferry.core.errors import PageferryError
from pageferry.core.events import MigrationReport
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policies import ConvergePolicy, DowntimePolicy, XenPolicy
from pageferry.core.policy import Policy
from pageferry.core.vm import Vm
from pageferry.guests.abi import read_status
from pageferry.testing.lab import Lab, Violation, require

DEFAULT_COUNT = 200
_MAX_TRIPS = 10
_TIMEOUT_S = 60.0
_POLL_S = 0.002
_FULL_PASSES = 4  # which of kv's status values counts the passes of its check over the whole table
_SIZES = (8 << 20, (4 << 20) + PAGE_SIZE, (32 << 20) - PAGE_SIZE, (3 << 30) + 5 * PAGE_SIZE, (5 << 30) + 3 * PAGE_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """One migration: to a machine of ``kind``, by ``policy``."""

    kind: Kind
    policy: Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One guest: what it is, on what kind of machine it is born, and its legs: there, back, there, back, ..."""

    memory_bytes: int
    cpus: int
    working_set_pages: int
    seed: int
    born: Kind
    legs: tuple[Leg, ...]

    def __str__(self) -> str:
        pages = f"working set {self.working_set_pages} pages"
        return f"kv, {self.memory_bytes} bytes, {self.cpus} vCPU(s), {pages}, seed {self.seed}, on {self.born.name}"


def lives(seed: int, count: int, kinds: Sequence[Kind]) -> Iterator[Life]:
    """Yield guests that make ``count`` round trips together; the same arguments always give the same guests."""
    draw = random.Random(seed)
    while count > 0:
        trips = min(count, draw.randint(1, _MAX_TRIPS))
        count -= trips
        cpus = draw.choice((1, 1, 2, 3))
        yield Life(
            memory_bytes=draw.choice(_SIZES),
            cpus=cpus,
            working_set_pages=draw.randint(8 * cpus, 300),
            seed=draw.getrandbits(64),
            born=draw.choice(kinds),
            legs=tuple(Leg(kind=draw.choice(kinds), policy=_policy(draw)) for _ in range(2 * trips)),
        )


def _policy(draw: random.Random) -> Policy:
    if draw.random() < 0.5:
        return XenPolicy(max_rounds=draw.randint(1, 6), min_dirty_pages=draw.choice((1, 50)))
    # So much that the speed of the host decides nothing.
    return draw.choice((DowntimePolicy, ConvergePolicy))(limit_s=_TIMEOUT_S)


def live(life: Life, on_leg: Callable[[Leg, MigrationReport], None]) -> None:
    """Boot the guest and let it make all its trips.

    Args:
        life: what to do.
        on_leg: told of each migration once the guest has checked itself after it.

    Raises:
        MigrationError: a migration failed.
        Violation: one was not verified, or the guest found its memory wrong, or stands still.
    """
    lab = Lab(make_vm=life.born.make_vm, memory_bytes=life.memory_bytes, seed=life.seed, cpus=life.cpus)
    with lab.guest("kv", pages=life.working_set_pages) as guest:
        vm = guest.vm
        try:
            vm.resume()
            until_checked(vm)
            for leg in life.legs:
                there, report = migrate(vm, leg)
                vm.close()
                vm = there
                until_checked(vm)
                on_leg(leg, report)
        finally:
            vm.close()


def migrate(vm: Vm, leg: Leg) -> tuple[Vm, MigrationReport]:
    """Move a guest to a new machine over a loopback socket; return that machine, and the report.

    Raises:
        MigrationError: it did not move.
        Violation: it moved without proof.
    """
    inn = Inn(leg.kind.make_vm)
    try:
        report = source_of(vm, inn.open(), leg.policy).run()
        arrived = inn.outcome() is inn.vm
        require(arrived and report.verified, "the migration completed, but no verified guest has arrived")
        return inn.check_out(), report
    finally:
        inn.close()


def until_checked(vm: Vm) -> None:
    """Wait until every vCPU of the running guest has begun and ended a full check of its table."""
    passes = [slot.values[_FULL_PASSES] + 2 for slot in read_status(vm.memory, vm.config.cpus)]
    for _ in range(int(_TIMEOUT_S / _POLL_S)):
        slots = read_status(vm.memory, vm.config.cpus)
        require(vm.end is None, f"the guest ended: {vm.end}, {slots}")
        if all(slot.values[_FULL_PASSES] >= wanted for slot, wanted in zip(slots, passes, strict=True)):
            return
        vm.wait(_POLL_S)
    raise Violation(f"the guest makes no progress: {vm.status}, {read_status(vm.memory, vm.config.cpus)}")


def soak(seed: int, count: int, kinds: Iterable[Kind], say: Callable[[str], None]) -> None:
    """Make ``count`` round trips over these kinds; ``say`` is told one line about each thing that happens.

    Raises:
        Exception: whatever ended a trip badly; the seed has been said once more.
    """
    say(f"soak: seed {seed}, {count} round trips")
    kinds = working(kinds, say)
    legs: list[Leg] = []

    def done(leg: Leg, report: MigrationReport) -> None:
        legs.append(leg)
        trip = f"{(len(legs) + 1) // 2}/{count} {'there' if len(legs) % 2 else 'back '}"
        say(f"{trip} {leg.kind.name:<16} {report.policy:<8} {len(report.rounds)} rounds, {report.verified_pages} pages")

    try:
        for life in lives(seed, count, kinds):
            say(str(life))
            live(life, done)
    except Exception as error:
        say(f"soak: FAILED after {len(legs)} migrations, seed {seed}, {count} round trips: {error}")
        raise
    say(f"soak: {count} round trips ({len(legs)} migrations) over {len(kinds)} kinds of machines, all verified")


def main(arguments: Sequence[str] | None = None, kinds: Iterable[Kind] = KINDS) -> int:
    """Run the soak over these kinds of machines; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulation.soak", description="Migrate there and back.")
    parser.add_argument("--seed", type=int, help="draw the trips of that seed (default: another one each time)")
    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="round trips (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count must be at least 1")
    seed = secrets.randbits(32) if options.seed is None else options.seed

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        soak(seed, options.count, kinds, say)
    except (PageferryError, Violation):  # said already; anything else is a defect, and shows where
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
