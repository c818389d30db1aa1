"""The conformance kit: its checks, each with a name and the law that it defends; and running them.

The laws are those of docs/internals/laws.md. The kit knows the protocols ``Machine`` and ``LogDirty`` and no machine.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from traceback import clear_frames

from pageferry.core.errors import PageferryError, UnsupportedError, UsageError
from pageferry.testing import copies, interleaved, operators, races, ranges, values
from pageferry.testing.lab import PATIENCE_S, Extra, Lab, MakeVm, Unfit, Violation
from pageferry.testing.watchdog import Hung

#: Neither a multiple of 64 pages nor of 2 MiB; and one that goes on behind the PCI hole.
DEFAULT_MEMORY_BYTES = ((4 << 20) + 3 * 4096, (3 << 30) + 5 * 4096)
DEFAULT_SEEDS = (1,)


#: The laws, in the words of docs/internals/laws.md. The checks here defend all but 6 and 7.
LAWS = {
    1: "Dirty or protected. At every instant each page of RAM under log-dirty has its bit set or is not writable.",
    2: "clean() loses no write. A write lands in this bitmap or a later one. No vCPU runs on a stale translation after "
    "it.",
    3: "Clean first, copy second. A page is read only after the clean() that reported it.",
    4: "Every writer marks, after its write.",
    5: "Dirty bits are a transaction. A migration that fails before the handoff leaves the source as it was.",
    6: "Never two runnable copies, never none by our doing.",
    7: "Verified, or not done.",
    8: "One fault per page per cycle.",
}


class ConformanceError(PageferryError):
    """A tracker broke a promise.

    Args:
        check: the check that found it.
        detail: what was expected and found.
        where: the guest it happened with.
    """

    def __init__(self, check: "Check", detail: str, *, where: str) -> None:
        promise = "operator semantics" if check.law is None else f"law {check.law}"
        lines = [f"{check.name} ({promise}): {detail}", f"  promised: {check.summary}"]
        if check.law is not None:
            lines.append(f"  law {check.law}: {LAWS[check.law]}")
        super().__init__("\n".join([*lines, f"  guest: {where}"]))
        self.check = check.name
        self.law = check.law
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check. ``law`` is None where it checks the plain meaning of an operator; ``summary`` is what it promises.

    ``once``: the guest's size and seed make no difference; the first ones will do.
    """

    name: str
    law: int | None
    run: Callable[[Lab], None]
    summary: str
    once: bool = False


def check_of(law: int | None, function: Callable[..., None], *, once: bool = False) -> Check:
    """Return a function as a check; its name is the check's, the first line of its docstring the promise."""
    summary = (function.__doc__ or "").partition("\n")[0]
    return Check(name=function.__name__.replace("_", "-"), law=law, run=function, summary=summary, once=once)


def _with_guest(law: int, function: Callable[..., None], workload: str) -> Check:
    check = check_of(law, function)
    return replace(
        check,
        name=f"{check.name}-{workload}",
        run=partial(function, workload=workload),
        summary=f"{check.summary} Guest: {workload}.",
    )


CHECKS: tuple[Check, ...] = (
    check_of(None, operators.off_at_first),
    check_of(None, operators.enable_starts_clear),
    check_of(None, operators.enable_twice),
    check_of(None, operators.peek_changes_nothing),
    check_of(None, operators.clean_clears),
    check_of(1, operators.clean_protects_again),
    check_of(1, operators.rounds_are_exact),
    check_of(1, operators.rounds_add_up),
    check_of(None, operators.bitmaps_are_the_callers),
    check_of(None, operators.off_and_on_again),
    check_of(None, operators.stats_count_the_bits),
    check_of(8, operators.one_fault_per_page),
    check_of(None, operators.pausing_is_no_write),
    check_of(4, operators.host_writes_are_marked),
    check_of(1, operators.released_pages_are_tracked),
    check_of(4, operators.marks_and_writes_mix),
    check_of(4, operators.marks_outside_ram),
    check_of(4, operators.state_restore_keeps_tracking),
    check_of(4, copies.marked_after_the_write),
    check_of(4, copies.device_marks_after_the_write),
    check_of(4, copies.marks_are_seen_at_once),
    check_of(2, copies.stamped_copy),
    check_of(2, races.changed_between_cleans),
    check_of(2, races.peek_grows),
    *(
        _with_guest(2, races.free_running, workload)
        for workload in ("stamp", "sweep", "random", "hotset", "kv", "smp", "idle", "pagetables")
    ),
    _with_guest(4, races.free_running, "dma"),
    check_of(2, races.peeking_thread),
    check_of(4, races.writing_thread),
    check_of(2, races.two_cleaners),
    check_of(5, races.on_and_off_while_running),
    check_of(2, values.permuted_words_are_reported),
    check_of(2, values.changed_back_is_reported),
    check_of(None, values.equal_value_is_reported),
    check_of(4, interleaved.clean_between_steps_of_a_mark, once=True),
    check_of(2, interleaved.mark_between_steps_of_clean, once=True),
    check_of(2, interleaved.mark_between_steps_of_peek, once=True),
    check_of(None, ranges.range_returns_its_own),
    check_of(None, ranges.strange_ranges),
    check_of(1, ranges.range_leaves_the_others),
    check_of(8, ranges.range_costs_no_other_fault),
    check_of(4, ranges.marks_by_range),
    check_of(3, ranges.stamped_copy_by_range),
    _with_guest(2, races.cleaned_by_range, "random"),
    _with_guest(2, races.cleaned_by_range, "smp"),
    _with_guest(4, races.cleaned_by_range, "dma"),
)


#: How often a check is run that the host may have disturbed.
_TRIES = 5
_VMSTAT = Path("/proc/vmstat")

#: What comes before every check.
_FIT = Check(
    name="can-be-checked",
    law=None,
    run=lambda lab: None,
    summary="The machine can be made, and its tracker has every method and property of LogDirty.",
)


def check_log_dirty(
    make_vm: MakeVm,
    *,
    memory_bytes: Sequence[int] = DEFAULT_MEMORY_BYTES,
    seeds: Sequence[int] = DEFAULT_SEEDS,
    cpus: int = 1,
    checks: Iterable[str] | None = None,
    patience_s: float = PATIENCE_S,
) -> None:
    """Run the checks and stop at the first broken promise.

    Args:
        make_vm: makes a machine with zeroed memory, paused; the kit closes it.
        memory_bytes: sizes of guests to try, each at least 4 MiB.
        seeds: for the guests' pseudo-random choices.
        cpus: vCPUs per guest.
        checks: names out of :data:`CHECKS`; None: all.
        patience_s: how long nothing may happen before a check is given up; see :func:`run_check`.

    Raises:
        ConformanceError: a promise was broken.
        UnsupportedError: the machine cannot be made.
        UsageError: there is no such check.
    """
    options = {"memory_bytes": memory_bytes, "seeds": seeds, "cpus": cpus, "checks": checks, "patience_s": patience_s}
    for error in failures(make_vm, **options):  # type: ignore[arg-type]  # our own, passed on
        raise error


def failures(
    make_vm: MakeVm,
    *,
    memory_bytes: Sequence[int] = DEFAULT_MEMORY_BYTES,
    seeds: Sequence[int] = DEFAULT_SEEDS,
    cpus: int = 1,
    checks: Iterable[str] | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[ConformanceError]:
    """Run the checks and yield every broken promise as it is found; otherwise as :func:`check_log_dirty`.

    A machine that refuses to be made, or a tracker that lacks a method, is the only failure.
    """
    for check in select(checks):
        for size_bytes in memory_bytes[:1] if check.once else memory_bytes:
            for seed in seeds[:1] if check.once else seeds:
                lab = Lab(make_vm=make_vm, memory_bytes=size_bytes, seed=seed, cpus=cpus, patience_s=patience_s)
                if error := run_check(check, lab):
                    yield error
                    if error.check == _FIT.name:
                        return


def select(names: Iterable[str] | None) -> tuple[Check, ...]:
    """Return the checks of these names, in the kit's order; all when None.

    Raises:
        UsageError: there is no such check.
    """
    if names is None:
        return CHECKS
    wanted = set(names)
    if unknown := wanted - {check.name for check in CHECKS}:
        raise UsageError(f"no such check: {', '.join(sorted(unknown))}", hint=", ".join(c.name for c in CHECKS))
    return tuple(check for check in CHECKS if check.name in wanted)


def pages_moved(vmstat: Path = _VMSTAT) -> int | None:
    """Return how many pages the host's kernel has moved in its memory since it was started; None if it does not say."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("pgmigrate_success ")), None)


def run_check(check: Check, lab: Lab, moved_pages: Callable[[], int | None] = pages_moved) -> ConformanceError | None:
    """Run one check on one guest, on a thread of its own; return what it found, or None when all is well.

    A check that hangs is given up: its threads and its machine stay as they are. One that finds pages reported that
    were not written is repeated if the host moved pages meanwhile (see :class:`~pageferry.testing.lab.Extra`).

    Args:
        check: which.
        lab: makes the guest.
        moved_pages: tells how many pages the host has moved.

    Raises:
        UnsupportedError: the machine cannot be made.
    """
    where = f"memory {lab.memory_bytes} bytes, seed {lab.seed}, {lab.cpus} vCPU(s)"
    try:
        for left in reversed(range(_TRIES)):
            before = moved_pages()
            try:
                lab.watch.run(partial(check.run, lab), lab.patience_s)
                break
            except Extra:
                if not left or moved_pages() == before:
                    raise
    except Violation as violation:
        return ConformanceError(check, str(violation), where=where)
    except Unfit as unfit:
        return ConformanceError(_FIT, str(unfit), where=where)
    except Hung as hung:
        return ConformanceError(check, f"nothing has happened for {lab.patience_s:g} s: {hung}", where=where)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever the machine under test throws where nothing may be thrown
        failure = ConformanceError(check, f"unexpected {type(error).__name__}: {error}", where=where)
        failure.__cause__ = error
        clear_frames(error.__traceback__)  # they would keep the guest's memory as long as the failure
        return failure
    return None
