"""Whether this host has room for a guest that is to come."""

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hostmem import available_bytes
from pageferry.core.memory import GuestMemory
from pageferry.core.units import format_size


def expect_room(memory: GuestMemory, pages: int) -> None:
    """Check that the host could give so many pages to a guest's memory without swapping.

    Raises:
        UsageError: it could not.
    """
    available = available_bytes()
    if not memory.reserved and available is not None and pages * PAGE_SIZE > available:
        raise UsageError(
            f"the guest holds {format_size(pages * PAGE_SIZE)}, this host has {format_size(available)} available",
            hint="free memory here, or choose another destination",
        )
