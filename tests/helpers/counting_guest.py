"""A guest that counts its work, scripted, on a clock of its own."""

import struct
from types import SimpleNamespace

from pageferry.core.memory import GuestMemory
from pageferry.core.vm import VmStatus
from pageferry.guests.abi import STATUS_GPA, STATUS_SLOT_BYTES


class CountingGuest:
    """A guest of two vCPUs that works at the rate it is told while the clock goes on."""

    def __init__(self):
        self.memory = GuestMemory.linear(2 << 20)
        self.config = SimpleNamespace(cpus=2)
        self.status = VmStatus.RUNNING
        self.at_s = 100.0
        self.work = 0

    def now_s(self):
        return self.at_s

    def pass_s(self, duration_s, *, per_s):
        self.at_s += duration_s
        self.work += round(duration_s * per_s)
        for index, share in enumerate((self.work // 3, self.work - self.work // 3)):
            self.memory.write(STATUS_GPA + index * STATUS_SLOT_BYTES, struct.pack("<Q", share))
