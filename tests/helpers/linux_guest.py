"""A Linux guest at work, as its console tells of it: `work.sh` of the image says a line for each round."""

import re
import threading
import time

_ROUND = re.compile(rb"^work: round \d+\r?$", re.MULTILINE)
#: What neither the work nor the kernel may ever say, however slow the host is.
_TROUBLE = re.compile(rb"WRONG|BUG:|WARNING:|Oops|Kernel panic|nobody cared|invalid opcode|segfault")
#: How often it is looked whether a guest that says nothing has ended.
_LOOK_S = 0.5


def trouble_in(said):
    """Return what the work or the kernel has complained of, or None."""
    trouble = _TROUBLE.search(said)
    return None if trouble is None else trouble[0]


class Said:
    """What a guest says on its console, wherever it is: machines are given to :meth:`listen_to` one after another."""

    def __init__(self):
        self._said = bytearray()
        self._changed = threading.Condition()
        self._vm = None

    def listen_to(self, vm, _name=""):
        """Take what ``vm`` says; called with the arguments of a Destination's ``before_run``."""
        self._vm = vm
        vm.on_console(self._add)

    def _add(self, data):
        with self._changed:
            self._said += data
            if data.endswith(b"\n"):
                self._changed.notify_all()

    def __bytes__(self):
        with self._changed:
            return bytes(self._said)

    def rounds(self):
        """Return how many rounds of work it has told of."""
        return len(_ROUND.findall(bytes(self)))

    def wait_for(self, condition, what, timeout_s):
        """Wait until ``condition()``, which looks at what was said."""
        give_up_s, end = time.monotonic() + timeout_s, None
        with self._changed:
            while not self._changed.wait_for(condition, _LOOK_S):
                if end is not None:  # before the last look, so there was nothing more to come
                    raise AssertionError(f"no {what}: {end}; the guest said:\n{self._tail()}")
                end = self._vm.end
                if time.monotonic() > give_up_s:
                    raise AssertionError(f"no {what} after {timeout_s} s; the guest said:\n{self._tail()}")

    def wait_for_more(self, size, timeout_s):
        """Wait until it has said more than ``size`` bytes, or until so much time has passed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._said) > size, timeout_s)

    def works_on(self, rounds=2, timeout_s=1800):
        """Wait for so many rounds more; nothing went wrong."""
        goal = self.rounds() + rounds
        self.wait_for(lambda: self.rounds() >= goal, f"{rounds} more rounds of work", timeout_s)
        self.expect_no_trouble()

    def expect_no_trouble(self):
        """Check that neither the work nor the kernel has complained."""
        trouble = trouble_in(bytes(self))
        assert trouble is None, f"{trouble!r} in what the guest said:\n{self._tail()}"

    def _tail(self):
        return self._said[-4000:].decode(errors="replace")
