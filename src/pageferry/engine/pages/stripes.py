"""Which connection a page travels on: a matter of its gfn alone, for both ends (docs/stream.md, part 2)."""

import numpy as np
from numpy.typing import NDArray

from pageferry.core.frames import PAGES_PER_2M, GfnArray


def connection_of(gfns: GfnArray, connections: int) -> NDArray[np.uint64]:
    """Return the connection of each page, uint64[n], from 0: 2 MiB of memory for each in turn."""
    return (gfns // np.uint64(PAGES_PER_2M)) % np.uint64(connections)
