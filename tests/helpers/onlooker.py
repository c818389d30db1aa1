"""Onlooker: sees one migration from outside, by the test's own clock and counts, to compare the report with.

It asks nothing of the engine: the wire is taped where it is written, calls of the machine, its tracker and its devices
are noted where they are made, and the policy and the observer of events are the test's own.
"""

import threading
import time
from dataclasses import dataclass

import numpy as np
from at_work import until, work

from pageferry.core.bitmap import expand_runs
from pageferry.core.events import PhaseBegan, PhaseEnded, RoundBegan, RoundEnded, RoundProgress
from pageferry.core.frames import PAGE_SIZE, gpa_of
from pageferry.core.guest_time import WorkSample
from pageferry.core.policy import Action, Decision
from pageferry.stream.format import PageType
from pageferry.stream.records import DeltaPages, PackedPages, PageData, ZeroPages

#: Frames that no guest here uses; the test writes one more of them in each round.
OWN = np.arange(6000, 6400, dtype=np.uint64)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a method that is watched."""

    name: str
    began_s: float
    ended_s: float
    thread: str
    result: object


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Where things stood at a moment: time, ends of the tapes, the guest's work, calls so far, pages that are dirty."""

    at_s: float
    tape_ends: tuple[int, ...]
    work: int
    calls: int
    dirty_pages: int | None = None


class Onlooker:
    """Watches ``vm``; ``run`` moves it and sees. Give its ``policy`` and ``on_event`` to what moves it.

    Args:
        vm: runs.
        decisions: what the policy says after each round, in turn.
    """

    name = "onlooker"

    def __init__(self, vm, decisions, limit_s=None):
        self.vm = vm
        self.limit_s = limit_s
        self.decisions = decisions
        self.switches = any(decision.action is Action.POST_COPY for decision in decisions)
        self.calls = []
        self.device_calls = {}
        self.began = {}  # phase -> Mark
        self.ended = {}
        self.round_began, self.round_progress, self.decided, self.round_ended = [], {}, [], []
        self.taped = None
        self._watch(vm, "freeze", "thaw", "save_state")
        self._watch(vm.log_dirty, "enable", "clean_range", "peek", "off")
        for device in vm.platform.bus.devices:
            self._watch(device, "save", log=self.device_calls.setdefault(device.name, []))
        for gfn in OWN[::2].tolist():
            vm.memory.write(gpa_of(gfn), bytes([gfn & 0xFF]) * PAGE_SIZE)
        self._written = 0
        self.before = self.mark()
        # A rate before of about a million operations a second, whatever the guest does in the moments until pre-copy.
        self.work_before = WorkSample(at_s=self.before.at_s - 100, work=self.before.work - 100_000_000)

    def _watch(self, owner, *names, log=None):
        for name in names:
            setattr(owner, name, self._watched(getattr(owner, name), name, self.calls if log is None else log))

    @staticmethod
    def _watched(sound, name, log):
        def call(*args):
            began_s = time.monotonic()
            result = sound(*args)
            thread = threading.current_thread().name
            log.append(Call(name=name, began_s=began_s, ended_s=time.monotonic(), thread=thread, result=result))
            return result

        return call

    def mark(self, dirty_pages=None):
        """Note where things stand now."""
        tapes = self.taped.tapes if self.taped is not None else []
        return Mark(
            at_s=time.monotonic(),
            tape_ends=tuple(map(len, tapes)),
            work=sum(work(self.vm)),
            calls=len(self.calls),
            dirty_pages=dirty_pages,
        )

    def dirty_pages(self):
        """What is dirty now, by a PEEK of the test's own."""
        return self.vm.log_dirty.peek().count()

    def write_one_more(self):
        """Write one page that was not written before, and one that was."""
        self._written += 1
        for gfn in (int(OWN[1]) + 2 * self._written, int(OWN[0])):
            self.vm.memory.write(gpa_of(gfn) + 8, self._written.to_bytes(8, "little"))

    def on_event(self, event):
        """See an event: only that it happens now, never what it counts."""
        match event:
            case PhaseBegan():
                self.began[event.phase] = self.mark()
            case PhaseEnded():
                self.ended[event.phase] = self.mark()
            case RoundBegan():
                self.round_began.append(self.mark())
            case RoundProgress() if not self.frozen:
                self.write_one_more()
                self.round_progress[event.index] = self.mark(self.dirty_pages())
            case RoundEnded():
                self.round_ended.append(self.mark())

    @property
    def frozen(self):
        """Whether the guest is frozen now in order to be paused."""
        return len(self.decided) > 0 and self.decided[-1][1].action is not Action.NEXT_ROUND

    def decide(self, progress):
        """Say what was planned, as a policy; a guest that is to be throttled was, by then."""
        if self.decided and self.decided[-1][1].throttle:
            before = self.decided[-1][0]
            until(lambda: any(each.thread == "throttle" for each in self.of("thaw", before)), "throttle")
        decision = self.decisions[len(self.decided)]
        self.decided.append((self.mark(self.dirty_pages()), decision))
        return decision

    # -- what was seen, afterwards ------------------------------------------------------------------------------------

    def of(self, name, begin=None, end=None):
        """The calls of that name, in order, between two marks."""
        return [each for each in self.calls[begin and begin.calls : end and end.calls] if each.name == name]

    def ends_of_rounds(self):
        """A mark at the end of each round, the stop-and-copy last."""
        return [mark for mark, _ in self.decided] + self.round_ended[len(self.decided) :]

    def rounds(self):
        """For each round the page records that it put on the tapes, and how many bytes in all."""
        records = [each for number in range(len(self.taped.tapes)) for each in self.taped.placed(connection=number)[0]]
        pages = [each for each in records if isinstance(each.event, PageData | ZeroPages | PackedPages | DeltaPages)]
        seen = []
        for begin, end in zip(self.round_began, self.ends_of_rounds(), strict=True):
            mine = [r for r in pages if begin.tape_ends[r.connection] <= r.begin < end.tape_ends[r.connection]]
            passed = sum(after - before for before, after in zip(begin.tape_ends, end.tape_ends, strict=True))
            seen.append((mine, passed))
        return seen


def gfns_of(event):
    """The pages that a record sends, by content or by name."""
    return event.pfns[event.types != PageType.XTAB] if isinstance(event, PageData) else event.pfns


def named_zero(event):
    """Those of them that it only names as zero."""
    if isinstance(event, PageData):
        return event.pfns[event.types == PageType.XALLOC]
    return event.pfns if isinstance(event, ZeroPages) else event.pfns[:0]


def decisions(*throttles, last=Action.STOP_AND_COPY):
    """A round for each share of its time that the guest is to be throttled in the next, then one more and ``last``."""
    planned = [
        Decision(action=Action.NEXT_ROUND, reason=f"round {index}", throttle=share)
        for index, share in enumerate(throttles)
    ]
    return [*planned, Decision(action=last, reason="that was the plan")]


def populated_pages(vm):
    """How many pages of the guest have storage."""
    return expand_runs(*vm.memory.populated()).size
