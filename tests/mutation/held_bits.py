"""Steps of faults that trackers over the kernel share: what becomes of the bits they hold (core/held_bits.py)."""

from typing import Any

from altered import alter

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

    alter(log, "clean_range", wrap)
