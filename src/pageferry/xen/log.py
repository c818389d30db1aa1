"""XenLogDirty: the RFC's operators as the RFC's own hypervisor has them, through ``XEN_DOMCTL_shadow_op``.

Xen makes all RAM NOT WRITABLE, takes the nested page fault, sets the page's bit and makes it writable: what
``pageferry.hypervisor`` models and ``/dev/kvm`` does under other names. What differs from
:class:`~pageferry.core.vm.LogDirty`, and what is done about it here (seen on Xen 4.17 with HAP):

- *PEEK and CLEAN while log-dirty is off* do not fail in Xen: they return an empty bitmap. Here they raise.
- *A CLEAN of a part* does not exist: ``pages`` bounds what is copied, always from frame 0. So ``clean_range`` cleans
  all, and holds the bits of the other parts until they are asked for (``_held``). No bit is lost; pages beside the
  range cost one more fault each, the price of calling it on part of a guest.
- *Writes from outside* are not logged: a foreign mapping bypasses the P2M's permissions. ``mark`` sets bits in
  ``_held``, as for every tracker over a kernel.
- *``dirty_count``* counts pages marked since the last CLEAN over the whole domain, and not over the range that was
  asked for. ``stats`` counts the bits of a PEEK instead.
- *``fault_count``* of Xen counts the write faults since the last CLEAN; HAP does not count and says 0. It is None
  here under HAP, and since ENABLE under shadow paging.
- *ENABLE while it is on* is EINVAL, whoever turned it on; so is ENABLE of a domain with a passed-through device.
- *Nothing is turned off by itself*: log-dirty stays on when this process ends; :mod:`pageferry.xen.undo_log` sees
  to that.
- *The hypervisor's own mappings* of guest pages (vCPU info and the like) are dirty only in a bitmap taken with
  ``LOGDIRTY_FINAL``, which ``peek_final`` asks for once the domain is paused for good.

Every operator pauses the domain in Xen for its length, so laws 1 and 2 hold as Xen keeps them.

Source: RFC, "Log-dirty operations"; Xen ``xen/include/public/domctl.h``, ``XEN_DOMCTL_shadow_op``.
"""

import errno
import threading
from collections.abc import Callable

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, XenError
from pageferry.core.held_bits import HeldBits, HeldLog
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import LogDirtyStats
from pageferry.xen import uapi
from pageferry.xen.domctl import Control, ShadowStats
from pageferry.xen.holder import holder_of


class XenLogDirty(HeldLog):
    """Log-dirty of one domain; implements :class:`pageferry.core.vm.LogDirty`.

    Args:
        control: Xen.
        domid: of the domain.
        memory: its RAM.
        hap: whether Xen uses hardware-assisted paging for it.
        note: told 1 before log-dirty is turned on and 0 when it is off.
    """

    def __init__(
        self,
        control: Control,
        domid: int,
        memory: GuestMemory,
        *,
        hap: bool,
        note: Callable[[int], None] = lambda on: None,
    ) -> None:
        self._control = control
        self._domid = domid
        self._memory = memory
        self._hap = hap
        self._note = note
        self._operator = threading.Lock()  # one operator at a time; a mark does not take it
        self._held = HeldBits(memory)
        self._faults = 0

    @property
    def tracker(self) -> str:
        """The tracker's name."""
        return "xen"

    def enable(self) -> None:
        """ENABLE: all bits clear, all RAM NOT WRITABLE, the guest runs on.

        Raises:
            LogDirtyError: log-dirty is on already, or Xen cannot turn it on.
            XenError: Xen refused otherwise.
        """
        with self._operator:
            if self.enabled:
                raise LogDirtyError("log-dirty is on already")
            self._note(1)
            try:
                self._control.shadow_op(self._domid, uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
            except XenError as error:
                self._note(0)
                if error.errno == errno.EINVAL:
                    raise _on_already(self._domid) from error
                raise
            self._faults = 0
            self._held.begin()

    def off(self) -> None:
        """OFF: all RAM WRITABLE, the bitmap freed. Does nothing when it is off already.

        Raises:
            XenError: Xen refused; for this object it is off.
        """
        with self._operator:
            if not self.enabled:
                return
            self._held.end()
            self._control.shadow_op(self._domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)
            self._note(0)

    def peek(self) -> DirtyBitmap:
        """PEEK: return a copy of the bitmap; nothing else changes.

        Raises:
            LogDirtyError: log-dirty is off, or Xen had no memory for the bitmap.
            XenError: Xen refused; no bit was cleared.
        """
        with self._operator:
            return self._peek(0)

    def peek_final(self) -> DirtyBitmap:
        """PEEK that also has what the hypervisor itself has mapped writable; the domain will not run on.

        Raises:
            LogDirtyError: as :meth:`peek`.
            XenError: as there.
        """
        with self._operator:
            return self._peek(uapi.XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL)

    def clean(self) -> DirtyBitmap:
        """CLEAN: return the bitmap, clear it, make RAM NOT WRITABLE again; the guest runs on.

        Raises:
            LogDirtyError: log-dirty is off, or Xen had no memory for the bitmap.
            XenError: Xen refused; no bit is lost, the next CLEAN has them.
        """
        return self.clean_range(range(self._memory.gfn_limit))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN; return the bits of these frames, and hold those of all others.

        Raises:
            LogDirtyError: as :meth:`clean`.
            ValueError: the range does not consist of whole words of the bitmap; no bit was cleared.
            XenError: as :meth:`clean`.
        """
        with self._operator:
            self._held.expect_on().words_of(gfns)
            bitmap, stats = self._take(uapi.XEN_DOMCTL_SHADOW_OP_CLEAN)
            self._faults += stats.fault_count
            self._held.add(bitmap)
            return self._held.take(gfns)

    def stats(self) -> LogDirtyStats:
        """Return the counters; does not disturb the bitmap.

        Raises:
            LogDirtyError: log-dirty is off.
        """
        with self._operator:
            self._held.expect_on()
            bitmap, stats = self._take(uapi.XEN_DOMCTL_SHADOW_OP_PEEK)
            bitmap |= self._held.copy()
            faults = None if self._hap else self._faults + stats.fault_count
            return LogDirtyStats(fault_count=faults, dirty_count=bitmap.count())

    def _peek(self, mode: int) -> DirtyBitmap:
        self._held.expect_on()
        bitmap, _ = self._take(uapi.XEN_DOMCTL_SHADOW_OP_PEEK, mode)
        bitmap |= self._held.copy()
        return bitmap

    def _take(self, op: int, mode: int = 0) -> tuple[DirtyBitmap, ShadowStats]:
        """Return Xen's bitmap, of frames that are RAM here, and its counters."""
        bitmap = DirtyBitmap(self._memory.gfn_limit)
        stats = self._control.shadow_op(self._domid, op, mode=mode, words=bitmap.words, pages=bitmap.nbits)
        bitmap &= self._memory.all_ram()
        return bitmap, stats


def _on_already(domid: int) -> LogDirtyError:
    if by := holder_of(domid):
        return LogDirtyError(f"log-dirty of domain {domid} is on already, by {by}", hint="wait for it, or end it")
    return LogDirtyError(
        f"Xen does not turn log-dirty on for domain {domid}: it is on already, or the domain has a passed-through "
        "device",
        hint="is another save or migration of it under way? A device can be detached: xl pci-detach",
    )
