"""A Linux guest at work, as its console tells of it: `work.sh` of the image says a line for each round."""

import re
import threading

_ROUND = re.compile(rb"^work: round \d+\r?$", re.MULTILINE)
#: What neither the work nor the kernel may ever say, however slow the host is.
_TROUBLE = re.compile(rb"WRONG|BUG:|WARNING:|Oops|Kernel panic|nobody cared|invalid opcode|segfault")


class Said:
    """What a guest says on its console, wherever it is: machines are given to :meth:`listen_to` one after another."""

    def __init__(self):
        self._said = bytearray()
        self._changed = threading.Condition()

    def listen_to(self, vm, _name=""):
        """Take what ``vm`` says; called with the arguments of a Destination's ``before_run``."""
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
        with self._changed:
            if not self._changed.wait_for(condition, timeout_s):
                raise AssertionError(f"no {what} after {timeout_s} s; the guest said:\n{self._tail()}")

    def wait_for_more(self, size, timeout_s):
        """Wait until it has said more than ``size`` bytes, or until so much time has passed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._said) > size, timeout_s)

    def works_on(self, rounds=2, timeout_s=600):
        """Wait for so many rounds more; nothing went wrong."""
        goal = self.rounds() + rounds
        self.wait_for(lambda: self.rounds() >= goal, f"{rounds} more rounds of work", timeout_s)
        self.expect_no_trouble()

    def expect_no_trouble(self):
        """Check that neither the work nor the kernel has complained."""
        trouble = _TROUBLE.search(bytes(self))
        assert trouble is None, f"{trouble[0]!r} in what the guest said:\n{self._tail()}"

    def _tail(self):
        return self._said[-4000:].decode(errors="replace")
