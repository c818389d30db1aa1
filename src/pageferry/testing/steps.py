"""Steps: stop a call before any of its steps, and have another thread do something there.

Races are found by luck only if the threads are left to themselves. Here a call runs on a thread under a tracer that
stops it before one chosen *step*, an instruction of Python that touches what other threads may see: an attribute, an
item, a call. Another call is made meanwhile, whole, and then the first goes on. Doing that for each step of the first
finds whatever one interruption can break, on the first try, every time.

When the second call waits for a lock that the first one holds, the first goes on at once; that, too, is an order in
which two threads can run. Whether it waits is seen by its thread: asleep, at the same instruction.

What it cannot see: steps inside of functions that are not written in Python, in the standard library and in NumPy.
These run as one.
"""

import dis
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

import numpy as np

from pageferry.core.threads import begin
from pageferry.testing.watchdog import THREAD_NAME

Result = TypeVar("Result")

#: What may touch what others see; all else is a thread's own business.
_TOUCHES = (
    *("LOAD_ATTR", "LOAD_METHOD", "LOAD_DEREF", "LOAD_SPECIAL", "LOAD_SUPER_ATTR", "STORE_ATTR", "STORE_DEREF"),
    *("BINARY_SUBSCR", "BINARY_SLICE", "BINARY_OP", "STORE_SUBSCR", "STORE_SLICE", "CALL", "BEFORE_WITH"),
)
#: An instruction in a loop is a step this often.
_TIMES = 2
_LOOK_S = 0.0005
_ASLEEP_LOOKS = 8
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})
_OTHERS = (str(Path(__file__).parent), str(Path(np.__file__).parent), "<")


class Interrupted:
    """One call with an interruption.

    Args:
        first: the call that is interrupted.
        second: what is called in between, on another thread.
        at: before which step of the first, from 0.
        done: called with what the first returned, at once and on its thread; has no steps.
    """

    def __init__(
        self, first: Callable[[], Result], second: Callable[[], None], at: int, *, done: Callable[[Result], None]
    ) -> None:
        self._first: Callable[[], Any] = first
        self._done: Callable[[Any], None] = done
        self._second = second
        self._at = at
        self._seen: Counter[tuple[CodeType, int]] = Counter()
        self._steps = 0
        self._stopped, self._go_on = threading.Event(), threading.Event()
        self._errors: list[BaseException] = []
        self.place: str | None = None
        """Where the first call was interrupted; None: it has no such step, and was not."""

    def run(self) -> None:
        """Make both calls; the second one only if the first has such a step. Raises what they raise."""
        first = self._thread(self._traced, "first")
        self._stopped.wait()
        if self.place is not None:
            try:
                second = self._thread(self._second, "second")
                _until_ended_or_asleep(second)
            finally:
                self._go_on.set()
            second.join()
        first.join()
        if self._errors:
            raise self._errors[0]

    def _thread(self, call: Callable[[], None], name: str) -> threading.Thread:
        def main() -> None:
            try:
                call()
            except BaseException as error:
                self._errors.append(error)

        return begin(main, f"{THREAD_NAME}-{name}")

    def _traced(self) -> None:
        try:
            sys.settrace(self._on_call)
            try:
                result = self._first()
            finally:
                sys.settrace(None)
            self._done(result)
        finally:
            self._stopped.set()

    def _on_call(self, frame: FrameType, _event: str, _argument: object) -> Callable[..., Any] | None:
        if not _is_stepped(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_instruction

    def _on_instruction(self, frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
        if event == "opcode" and self.place is None and self._is_step(frame):
            if self._steps == self._at:
                self.place = f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
                self._stopped.set()
                self._go_on.wait()
            self._steps += 1
        return self._on_instruction

    def _is_step(self, frame: FrameType) -> bool:
        code, at = frame.f_code, frame.f_lasti
        if not dis.opname[code.co_code[at]].startswith(_TOUCHES):
            return False
        self._seen[code, at] += 1
        return self._seen[code, at] <= _TIMES


def called_by(call: Callable[[], object]) -> set[str]:
    """Return the names of the Python functions that a call calls, and these in turn."""
    names: set[str] = set()
    sys.setprofile(lambda frame, _event, _argument: names.add(frame.f_code.co_name))
    try:
        call()
    finally:
        sys.setprofile(None)
    return names


def _is_stepped(path: str) -> bool:
    if path.startswith(_OTHERS):
        return False
    return not path.startswith(_LIBRARIES) or "-packages" in path


def _until_ended_or_asleep(thread: threading.Thread) -> None:
    """Return when a thread has ended, or sleeps at one instruction and does not wake up."""
    before: object = None
    looks = 0
    while looks < _ASLEEP_LOOKS:
        thread.join(_LOOK_S)
        if not thread.is_alive():
            return
        frame = sys._current_frames().get(thread.ident or 0)
        now = frame and (frame.f_code, frame.f_lasti)
        looks = looks + 1 if now == before and _sleeps(thread) else 0
        before = now


def _sleeps(thread: threading.Thread) -> bool:
    try:
        stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:  # it has just ended
        return False
    return stat.rpartition(")")[2].split()[0] == "S"
