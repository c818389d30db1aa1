"""Log-dirty under hardware-assisted paging: the P2M is the only table between a write and memory.

Xen's ``hap_enable_log_dirty``, ``hap_disable_log_dirty`` and ``hap_clean_dirty_bitmap``.
"""

from pageferry.core.frames import GfnArray
from pageferry.hypervisor.p2m import P2M, P2MType
from pageferry.hypervisor.paging import LogDirtyOps


def hap_log_dirty_ops(p2m: P2M) -> LogDirtyOps:
    """Return the operations for a domain whose vCPUs run on this P2M.

    Source: RFC design 1, the last step of each operator.
    """

    def enable() -> None:
        p2m.change_entry_type_global(logdirty=True)

    def disable() -> None:
        p2m.change_entry_type_global(logdirty=False)

    def clean(written: GfnArray) -> None:
        p2m.change_types(written, P2MType.RAM_RW, P2MType.RAM_LOGDIRTY)

    return LogDirtyOps(enable=enable, disable=disable, clean=clean)
