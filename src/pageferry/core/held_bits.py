"""HeldBits: the dirty bits that a tracker over the kernel holds itself, and the operators that need only those."""

import threading

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory


class HeldBits:
    """The bits that are a tracker's own and not the kernel's, while log-dirty is on; off at first.

    They are the bits of writers other than vCPUs (``mark``), and those that the tracker has taken from the kernel and
    not yet handed out. All methods may be called from any thread. Their lock is held for moments and
    nothing is called under it: a device marks on a vCPU's thread, and must not wait for a long CLEAN.

    Args:
        memory: the guest's; tells which frames are RAM, and how many there are.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._bits: DirtyBitmap | None = None  # None: log-dirty is off

    @property
    def on(self) -> bool:
        """Whether log-dirty is on."""
        return self._bits is not None

    def begin(self) -> None:
        """Be on from now on, with no bit set."""
        with self._lock:
            self._bits = DirtyBitmap(self._memory.gfn_limit)

    def end(self) -> None:
        """Be off, and free the bits. May be called twice."""
        with self._lock:
            self._bits = None

    def expect_on(self) -> DirtyBitmap:
        """Return the bits, to look at and no more.

        Raises:
            LogDirtyError: log-dirty is off.
        """
        if self._bits is None:
            raise LogDirtyError("log-dirty is off")
        return self._bits

    def mark(self, gfns: GfnArray) -> None:
        """Set the bits of frames that are RAM, written already; ignore others. Does nothing while log-dirty is off."""
        if self._bits is not None:
            self.set(gfns[self._memory.are_ram(gfns)])

    def set(self, gfns: GfnArray) -> None:
        """Set the bits of frames, which are all RAM. Does nothing while log-dirty is off."""
        with self._lock:
            if self._bits is not None:
                self._bits.set(gfns)

    def add(self, bitmap: DirtyBitmap, where: slice = slice(None)) -> None:
        """Set every bit that is set in ``bitmap``, which stays the caller's.

        Args:
            bitmap: the bits.
            where: all of them are in these words of it; cost grows with them.

        Raises:
            LogDirtyError: log-dirty is off.
        """
        with self._lock:
            self.expect_on().words[where] |= bitmap.words[where]

    def copy(self) -> DirtyBitmap:
        """Return a copy of the bits.

        Raises:
            LogDirtyError: log-dirty is off.
        """
        with self._lock:
            return self.expect_on().copy()

    def take(self, gfns: range) -> DirtyBitmap:
        """Return the bits of a range, and clear them; see :meth:`DirtyBitmap.take`.

        Raises:
            LogDirtyError: log-dirty is off.
            ValueError: the range does not consist of whole words of the bitmap; no bit was cleared.
        """
        with self._lock:
            return self.expect_on().take(gfns)


class HeldLog:
    """The operators that need only the held bits; base of every tracker over the kernel."""

    _held: HeldBits

    @property
    def enabled(self) -> bool:
        """Whether log-dirty is on."""
        return self._held.on

    def mark(self, gfns: GfnArray) -> None:
        """Mark frames dirty, *after* writing them by other means than a vCPU. Does nothing while log-dirty is off.

        Frames that are not RAM are ignored.
        """
        self._held.mark(gfns)
