"""A shell on the console of a Linux guest, and what it answers."""

import threading
from itertools import count

#: A guest may be emulated twice over, on a busy host.
PATIENCE_S = 1200


class Terminal:
    """A shell on the console of a guest, which may change machines."""

    def __init__(self):
        self._said = bytearray()
        self._changed = threading.Condition()
        self._marks = count(1)

    def attach(self, vm):
        self._vm = vm
        vm.on_console(self._add)

    def _add(self, data):
        with self._changed:
            self._said += data
            self._changed.notify_all()

    def wait_for(self, text, begin=0):
        with self._changed:
            came = self._changed.wait_for(lambda: text in self._said[begin:], PATIENCE_S)
            assert came, f"no {text!r}; the guest said:\n{self._said[-3000:].decode(errors='replace')}"

    def run(self, command):
        """Return the lines that a command says."""
        begin, mark = len(self._said), next(self._marks)
        self.type(f"echo begin-$(({mark})); {command}; echo end-$(({mark}))")
        self.wait_for(b"end-%d\r\n" % mark, begin)
        said = self._said[begin:].decode().replace("\r", "")
        return said.partition(f"begin-{mark}\n")[2].partition(f"end-{mark}\n")[0].splitlines()

    def type(self, line):
        assert self._vm.type_console(line.encode() + b"\n") == len(line) + 1
