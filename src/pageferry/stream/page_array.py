"""The pages that a record of our own names: count u32, reserved u32, then the pfns, each a u64, ascending."""

import numpy as np

from pageferry.core.frames import GfnArray
from pageferry.stream import format as fmt
from pageferry.stream.format import BodyError


def pack(pfns: GfnArray) -> bytes:
    """Return the beginning of the body."""
    return fmt.PAGE_DATA_HEAD.pack(pfns.size, 0) + pfns.astype("<u8").tobytes()


def parse(body: bytes) -> tuple[GfnArray, bytes]:
    """Return the pages (uint64[n], 1 to 1,024, strictly ascending, read-only) and what follows.

    Args:
        body: at least 8 bytes.

    Raises:
        BodyError: it does not hold as many pages as it says, or they are not as above.
    """
    count, reserved = fmt.PAGE_DATA_HEAD.unpack_from(body)
    if reserved:
        raise BodyError(f"a reserved field is {reserved:#x}, not 0")
    end = fmt.PAGE_DATA_HEAD.size + count * 8
    if not 0 < count <= fmt.MAX_PAGES_PER_RECORD or len(body) < end:
        raise BodyError(f"a body of {len(body)} bytes does not hold {count} pages")
    pfns = np.frombuffer(body, "<u8", count, fmt.PAGE_DATA_HEAD.size).astype(np.uint64)
    if int(pfns.max()) > fmt.PFN_MASK:
        raise BodyError(f"entry {int(np.argmax(pfns > fmt.PFN_MASK))}: bits 63 to 52 are not 0")
    if (pfns[1:] <= pfns[:-1]).any():
        raise BodyError("the pages do not ascend")
    pfns.flags.writeable = False
    return pfns, body[end:]
