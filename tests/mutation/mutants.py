"""``make mutants``: every fault against everything that should find it, and the table of what did.

    python -m mutation.mutants [--json | --markdown] [FAULT ...]

Ends with 0 when the implementation without a fault passes everything and every fault was found; with 1 otherwise.
Faults of KVM are left out where KVM does not work, or lacks what their tracker needs, which is said.
Progress goes to standard error.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mutation import FAULTS, WRAPPED, Fault, Room, checks_of, lab_of, sound_benches
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.machine import Machine
from pageferry.core.vm import VmConfig
from pageferry.kvm.probe import probe
from pageferry.testing.conformance import Check, ConformanceError, run_check
from pageferry.testing.lab import Lab

_HEAD = """\
# The mutation suite

Bugs that really lost dirty pages, in KVM, QEMU, Xen and others, and some that were never reported but that the code
invites, put into this implementation one at a time; and what finds each. `make mutants` runs them all and prints this
table (`python -m mutation.mutants --markdown` in this form).

*Breaks* is the law of [laws.md](internals/laws.md) that the fault breaks, or the plain meaning of an operator, of save
and load, or of the report. *Caught by* is the first check that fails; the checks of that law are tried first, then the
others. *After* counts the checks tried, and the CLEANs in all of them together; where a guest runs free that number
varies.

The faults are in `tests/mutation/`; its `__init__.py` lists the modules. In the software hypervisor and over KVM a
fault is a function that replaces one step of one machine. It falls to the conformance kit, or, where the kit cannot
look, to the audit, the paging pool and moves of each device. In the engine a fault is a source, a destination, a save
or a lazy restore with a wrong part. It falls to migrations and saves that are disturbed at the worst moment. The
faults of a *tracker* wrap a sound one and need no implementation to break: they prove the published kit alone.
"""

_TITLES = {
    Room.HYPERVISOR: "In the software hypervisor",
    Room.KVM: "In the trackers over KVM's own logs",
    Room.UFFD: "In the trackers by the host's page tables",
    Room.ENGINE: "In the engine",
    Room.TRACKER: "In front of any tracker",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What is tried: the faults, the benches that must pass without any, and what finds out whether KVM works."""

    faults: tuple[Fault, ...] = (*FAULTS, *WRAPPED)
    sound_benches: Callable[..., Iterator[tuple[Room, Lab, tuple[Check, ...]]]] = sound_benches
    probe: Callable[[], object] = probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one fault. ``caught_by`` is None when it escaped; ``detail`` is the check's own words.

    ``after_checks`` and ``after_cleans`` count the checks and the CLEANs up to and with the one that caught it.
    """

    fault: str
    room: str
    summary: str
    stands_for: str
    breaks: str
    caught_by: str | None
    caught_law: int | None
    detail: str
    after_checks: int
    after_cleans: int


_WHOLE = Suite()


def _law(law: int | None) -> str:
    return "operator" if law is None else f"law {law}"


def try_fault(fault: Fault) -> Verdict:
    """Run the checks against one fault until the first that finds it."""
    cleans = 0

    def counting(sound: Callable[..., Any]) -> Callable[..., Any]:
        def clean_range(gfns: range) -> Any:
            nonlocal cleans
            cleans += 1
            return sound(gfns)

        return clean_range

    def counted(make_vm: Callable[[VmConfig], Machine]) -> Callable[[VmConfig], Machine]:
        def make(config: VmConfig) -> Machine:
            vm = make_vm(config)
            log: Any = vm.log_dirty
            log.clean_range = counting(log.clean_range)  # which is what clean() calls
            return vm

        return make

    lab = lab_of(fault)
    lab = replace(lab, make_vm=counted(lab.make_vm))
    error: ConformanceError | None = None
    done = 0
    for check in checks_of(fault):
        done += 1
        error = run_check(check, lab)
        if error is not None:
            break
    return Verdict(
        fault=fault.name,
        room=str(fault.room),
        summary=fault.summary,
        stands_for=fault.stands_for,
        breaks=_law(error.law if error is not None and fault.room is Room.TRACKER else fault.law),
        caught_by=None if error is None else error.check,
        caught_law=None if error is None else error.law,
        detail="" if error is None else error.detail,
        after_checks=done,
        after_cleans=cleans,
    )


def sound_failures(suite: Suite, *, kvm: bool) -> Iterator[str]:
    """Run everything without a fault and yield what fails: there, a fault proves nothing."""
    for room, lab, checks in suite.sound_benches(kvm=kvm):
        _say(f"no fault: {room}, {lab.memory_bytes >> 20} MiB, {len(checks)} checks")
        try:
            yield from (f"{room}: {error}" for error in _failures(checks, lab))
        except UnsupportedError as missing:
            _say(f"left out: {missing}")


def _failures(checks: Sequence[Check], lab: Lab) -> Iterator[ConformanceError]:
    for check in checks:
        if error := run_check(check, lab):
            yield error


def kvm_works(suite: Suite) -> bool:
    """Tell whether faults of KVM can be tried here; say why not."""
    try:
        suite.probe()
    except (UnsupportedError, VmError) as error:
        _say(f"faults of KVM are left out: {error}")
        return False
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _caught(verdict: Verdict) -> str:
    if verdict.caught_by is None:
        return "ESCAPED"
    return f"{verdict.caught_by} ({_law(verdict.caught_law)})"


def _after(verdict: Verdict) -> str:
    return f"{_counted(verdict.after_checks, 'check')}, {_counted(verdict.after_cleans, 'CLEAN')}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def as_text(verdicts: Sequence[Verdict]) -> str:
    """Return the table for a terminal."""
    rows = [("FAULT", "BREAKS", "CAUGHT BY", "AFTER", "STANDS FOR")]
    rows += [(f"{v.room}: {v.fault}", v.breaks, _caught(v), _after(v), v.stands_for) for v in verdicts]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    )


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """Return docs/mutants.md."""
    lines = [_HEAD]
    for room, title in _TITLES.items():
        ours = [verdict for verdict in verdicts if verdict.room == room]
        if not ours:
            continue
        known = room is not Room.TRACKER
        lines += [f"## {title}", ""]
        lines += [f"| fault | what is wrong | {'stands for | breaks | ' if known else ''}caught by | after |"]
        lines += ["|---|---|---|---|" + "---|---|" * known]
        for v in ours:
            real = f"{v.stands_for} | {v.breaks} | " if known else ""
            lines += [f"| `{v.fault}` | {v.summary.replace('``', '`')} | {real}{_caught(v)} | {_after(v)} |"]
        lines += [""]
    return "\n".join(lines).rstrip()


def as_json(verdicts: Sequence[Verdict], failed: Sequence[str]) -> str:
    """Return everything for programs."""
    return json.dumps({"sound_failures": list(failed), "faults": [asdict(v) for v in verdicts]}, indent=2)


def _options(arguments: Sequence[str] | None, suite: Suite) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mutation.mutants", description="Try every fault.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print docs/mutants.md")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="only these")
    options = parser.parse_args(arguments)
    known = {fault.name for fault in suite.faults}
    if unknown := set(options.faults) - known:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    return options


def main(arguments: Sequence[str] | None = None, suite: Suite = _WHOLE) -> int:
    """Run the suite; return the exit code."""
    options = _options(arguments, suite)
    kvm = kvm_works(suite)
    faults = [
        fault
        for fault in suite.faults
        if (kvm or not fault.on_kvm) and (not options.faults or fault.name in options.faults)
    ]
    failed = [] if options.faults else list(sound_failures(suite, kvm=kvm))
    verdicts = []
    for number, fault in enumerate(faults, 1):
        try:
            verdicts.append(try_fault(fault))
        except UnsupportedError as missing:
            _say(f"{number}/{len(faults)} {fault.room}: {fault.name}: left out: {missing}")
            continue
        _say(f"{number}/{len(faults)} {fault.room}: {fault.name}: {_caught(verdicts[-1])}")
    for failure in failed:
        _say(f"without any fault: {failure}")
    if options.json:
        print(as_json(verdicts, failed))
    else:
        print(as_markdown(verdicts) if options.markdown else as_text(verdicts))
    escaped = [verdict.fault for verdict in verdicts if verdict.caught_by is None]
    _say(f"{len(verdicts)} faults, {len(escaped)} escaped" + "".join(f": {name}" for name in escaped))
    return 1 if escaped or failed else 0


if __name__ == "__main__":
    sys.exit(main())
