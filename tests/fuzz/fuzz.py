"""``make fuzz``: recorded conversations, files, states and commands, changed by chance, against whatever reads them.

    python -m fuzz.fuzz [--seed N] [--seconds N] [--target NAME] [--case N]

Each target (:mod:`fuzz.targets`) has a process of its own and an equal share of the time. First its seeds are run as
they are, and have the outcome that each says; then one case after another. The seed and a case's number decide all
chance in it, so both repeat it: they are said with a failure. A process that dies, as one that writes where no memory
is, and one that does nothing for two minutes, are failures too.

Ends with 0 when nothing was found, with 1 otherwise.
"""

import argparse
import contextlib
import faulthandler
import os
import random
import re
import secrets
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from fuzz.seeds import TARGETS
from fuzz.structure import Mutation, any_chunk, joined
from fuzz.targets import Target, WrongError, require

DEFAULT_SECONDS = 60.0
_HANGS_S = 120.0
_NUMBER = struct.Struct("<q")
#: The seeds as they are come before case 0.
_SEEDS_THEMSELVES = -1


class Fuzzer:
    """Makes cases for one target, and runs them.

    Args:
        target: closed with this.
        seed: decides, with a case's number, all chance in it.
    """

    def __init__(self, target: Target, seed: int) -> None:
        self._target = target
        self._seed = seed
        self._cut = {name: [target.cut(turn.said) for turn in each.turns] for name, each in target.seeds.items()}

    def run_seeds(self) -> None:
        """Run the seeds as they are.

        Raises:
            WrongError: one has another outcome.
        """
        for name, seed in self._target.seeds.items():
            draw = random.Random(f"{self._seed} {self._target.name} {name}")
            outcome = self._target.run(seed, seed.turns, set(), draw)
            require(re.search(seed.outcome, outcome), f"{name!r} ended otherwise than {seed.outcome!r}: {outcome}")

    def run_case(self, number: int) -> str:
        """Run one case; return its outcome.

        Raises:
            WrongError: something was so that must not be.
        """
        draw = random.Random(f"{self._seed} {self._target.name} {number}")
        recorded = [name for name, each in self._target.seeds.items() if each.recorded]
        name = draw.choice(recorded if recorded and draw.random() < 0.7 else list(self._cut))
        seed, others = self._target.seeds[name], list(self._cut.values())
        mutation = Mutation(draw, lambda: any_chunk(draw.choice(others), draw), self._target.keeps)
        changed = mutation.of(self._cut[name])
        turns = [replace(turn, said=joined(chunks)) for turn, chunks in zip(seed.turns, changed, strict=True)]
        return self._target.run(seed, turns, mutation.touched or {"nothing"}, draw)

    def close(self) -> None:
        """Check what is left of all cases.

        Raises:
            WrongError: something is.
        """
        self._target.close()


def kind_of(outcome: str) -> str:
    """Return an outcome without what differs from case to case; of a migration with the phase that it came to."""
    phase = re.search(r"\(phase ([a-z-]+)", outcome)
    kind = re.sub(r"[^a-zA-Z ].*", "", outcome).strip() or "other"
    return kind if phase is None else f"{kind} in {phase[1]}"


def child(target: Target, seed: int, case: int | None, until_s: float, begin: Callable[[int], None]) -> int:
    """Run cases in this process until a time; ``begin`` is told the number of each. Return the exit code."""
    fuzzer, number, outcomes = Fuzzer(target, seed), _SEEDS_THEMSELVES, Counter[str]()
    try:
        begin(number)
        fuzzer.run_seeds()
        while (number < 0 or time.monotonic() < until_s) if case is None else number != case:
            number = number + 1 if case is None else case
            begin(number)
            outcomes[kind_of(fuzzer.run_case(number))] += 1
        fuzzer.close()
    except Exception as error:
        what = str(error) if isinstance(error, WrongError) else "".join(traceback.format_exception(error))
        print(f"fuzz: {target.name}: {what}", flush=True)
        return 1
    shown = ", ".join(f"{kind} {count}" for kind, count in outcomes.most_common(8))
    print(f"fuzz: {target.name}: {len(target.seeds)} seeds, {sum(outcomes.values())} cases: {shown}", flush=True)
    return 0


def watched(name: str, seed: int, case: int | None, seconds: float, say: Callable[[str], None]) -> bool:
    """Run cases of a target in a process of their own; return whether nothing was found."""
    reads, writes = os.pipe()
    command = [sys.executable, "-m", "fuzz.fuzz", "--seed", str(seed), "--seconds", str(seconds), "--target", name]
    command += ["--progress", str(writes), *([] if case is None else ["--case", str(case)])]
    number, hangs = _SEEDS_THEMSELVES, False
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    popen = subprocess.Popen(
        command, pass_fds=[writes], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    os.close(writes)
    with popen, contextlib.closing(os.fdopen(reads, "rb", buffering=0)) as progress:
        while not hangs:
            hangs = not select.select([progress], [], [], _HANGS_S)[0]
            if not hangs and not (data := progress.read(_NUMBER.size)):
                break
            number = number if hangs else _NUMBER.unpack(data)[0]
        if hangs:
            popen.send_signal(signal.SIGABRT)  # its threads are told of as it dies
        printed = popen.communicate()[0].rstrip()
    say(printed)
    if popen.returncode == 0:
        return True
    how = "hangs" if hangs else "dies" if popen.returncode < 0 else "found"
    where = "its seeds" if number < 0 else f"case {number}"
    again = f"make fuzz SEED={seed} TARGET={name}" + ("" if number < 0 else f" CASE={number}")
    say(f"fuzz: FAILED: {name} {how} ({popen.returncode}) in {where} of seed {seed}; again: {again}")
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.fuzz", description="Feed wrong things to whatever reads.")
    parser.add_argument("--seed", type=int, help="draw the cases of that seed (default: another one each time)")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="for all targets (default: %(default)s)")
    parser.add_argument("--target", choices=TARGETS, help="only this one")
    parser.add_argument("--case", type=int, help="only this one, of one target")
    parser.add_argument("--progress", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is not None and options.target is None:
        parser.error("--case needs --target")
    if options.progress is not None:
        faulthandler.enable()
        until_s = time.monotonic() + options.seconds
        target = TARGETS[options.target]()
        return child(
            target,
            options.seed,
            options.case,
            until_s,
            lambda at: os.write(options.progress, _NUMBER.pack(at)) and None,
        )
    seed = secrets.randbits(32) if options.seed is None else options.seed
    names = [options.target] if options.target else list(TARGETS)
    print(f"fuzz: seed {seed}, {options.seconds:g} s over {', '.join(names)}", flush=True)

    def say(line: str) -> None:
        print(line, flush=True)

    share_s = options.seconds / len(names)
    sound = [watched(name, seed, options.case, share_s, say) for name in names]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
