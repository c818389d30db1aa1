"""What got worse from one result of ``vs_qemu.py --json`` to another, by more than the noise of both.

Ratios are compared, ours to the better QEMU of the same repetition, for they hold on a host that is slower today. One
is worse, or better, where the two ranges do not overlap at all and the medians are a tenth apart or more.

Exits with 1 where anything is worse.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NOTABLE = 1.1
_WORSE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A ratio that changed by more than the noise; below 1 is better than QEMU."""

    scenario: str
    measure: str
    before: float
    now: float

    @property
    def worse(self) -> bool:
        """Whether it grew."""
        return self.now > self.before

    def __str__(self) -> str:
        how = "worse" if self.worse else "better"
        return f"{how}: {self.scenario}: {self.measure}: {self.before:.2f} before, {self.now:.2f} now"


def changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    """Yield what changed between two results, as far as both measured it."""
    old = dict(_ratios(before))
    for key, ratio in _ratios(now):
        was = old.get(key)
        if was is None:
            continue
        apart = ratio["min"] > was["max"] or ratio["max"] < was["min"]
        low, high = sorted((was["median"], ratio["median"]))
        if apart and high >= _NOTABLE * low:
            scenario, measure = key
            yield Change(scenario=scenario, measure=measure, before=was["median"], now=ratio["median"])


def _ratios(result: dict[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    for each in result["results"]:
        for line in each.get("comparisons", ()):  # growth has none
            if line["ratio"] is not None:
                yield (each["scenario"], line["measure"]), line["ratio"]


def _read(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    list(_ratios(result))
    return dict(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="what vs_qemu.py --json printed")
    parser.add_argument("now", type=Path, help="what it printed later")
    options = parser.parse_args(arguments)
    results = []
    for path in (options.before, options.now):
        try:
            results.append(_read(path))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            parser.error(f"{path} is no result of vs_qemu.py --json: {error}")
    before, now = results
    if before["host"] != now["host"]:
        print(f"two hosts: {before['host']}\n           {now['host']}", file=sys.stderr)
    found = sorted(changes(before, now), key=lambda change: not change.worse)
    print(*found or ("no ratio changed by more than the noise",), sep="\n")
    return _WORSE if any(change.worse for change in found) else 0


if __name__ == "__main__":
    sys.exit(main())
