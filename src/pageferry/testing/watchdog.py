"""Watchdog: a check runs on a thread of its own, so that a tracker which hangs is a broken promise and not the end.

What the check does with the machine goes through :class:`Noted`, which counts the calls that return. When none has for
a long time, the check is given up, with where each of its threads is. They stay there: a thread cannot be ended, and
the machine cannot be freed under it.
"""

import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from pageferry.core.threads import begin

THREAD_NAME = "conformance"
"""What the names of the kit's own threads begin with."""

_KIT = str(Path(__file__).parent)
_LOOK_S = 0.25
_FRAMES = 6


class Hung(Exception):
    """Nothing has happened for too long; says where the threads are."""


class Watch:
    """Counts signs of life; one for each run of a check."""

    def __init__(self) -> None:
        self.signs = 0

    def run(self, action: Callable[[], None], patience_s: float) -> None:
        """Call ``action`` on another thread and wait for it; what it raises is raised here.

        Raises:
            Hung: nothing happened for ``patience_s``.
        """
        raised: list[BaseException] = []
        over = threading.Event()

        def main() -> None:
            try:
                action()
            except BaseException as error:
                raised.append(error)
            finally:
                over.set()

        before = set(threading.enumerate())
        thread = begin(main, THREAD_NAME)
        quiet_s, seen = 0.0, self.signs
        while not over.wait(_LOOK_S):
            quiet_s, seen = (quiet_s + _LOOK_S, seen) if self.signs == seen else (0.0, self.signs)
            if quiet_s >= patience_s:
                raise Hung(_where(each for each in threading.enumerate() if each not in before))
        thread.join()
        if raised:
            raise raised.pop()


class Noted:
    """Any object, of which each call that returns is a sign of life."""

    def __init__(self, target: object, watch: Watch) -> None:
        self._target = target
        self._watch = watch

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # the target's
        value = getattr(self._target, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            result = value(*arguments, **options)
            self._watch.signs += 1
            return result

        return call


def _where(threads: Iterable[threading.Thread]) -> str:
    frames = sys._current_frames()
    ours = (each.ident for each in threads if each.name.startswith(THREAD_NAME))
    return "; ".join(_place(frames[ident]) for ident in ours if ident in frames)


def _place(frame: FrameType) -> str:
    """Return where a thread of the kit is: its last line in the kit, and what that has called, up to where it waits."""
    stack = [each for each in traceback.extract_stack(frame) if each.filename != __file__]
    last = max((at for at, each in enumerate(stack) if each.filename.startswith(_KIT)), default=0)
    shown = stack[last : last + _FRAMES]
    return " > ".join(f"{each.name} ({Path(each.filename).name}:{each.lineno})" for each in shown)
