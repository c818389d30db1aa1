"""Steps of faults that trackers over the kernel share: what becomes of the bits they hold (core/held_bits.py)."""

from typing import Any

from mutation.fault import replace
from pageferry.core.bitmap import DirtyBitmap


def drop_marks(log: Any) -> None:
    """Have every CLEAN forget first what others than vCPUs marked."""

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            if log.enabled:
                log._held.begin()
            bitmap: DirtyBitmap = sound(gfns)
            return bitmap

        return clean_range

    replace(log, "clean_range", wrap)


def drop_given_back(log: Any) -> None:
    """Have ``give_back`` drop the bits of the failed round."""
    replace(log, "give_back", lambda _: lambda bitmap: log._held.expect_on())
