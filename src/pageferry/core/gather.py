"""Gathered and scattered I/O: a queue of buffers, of which each system call moves a part."""

#: Linux takes no more in one call (IOV_MAX).
MAX_BUFFERS = 1024


def first_left(queue: list[memoryview], at: int, moved_bytes: int) -> int:
    """Return the index of the first buffer that is not done after a call.

    Args:
        queue: the buffers; one that was moved in part is replaced by the rest of it.
        at: the index of the first buffer that was not done before the call.
        moved_bytes: what the call moved, from there on.
    """
    while at < len(queue) and moved_bytes >= len(queue[at]):
        moved_bytes -= len(queue[at])
        at += 1
    if moved_bytes:
        queue[at] = queue[at][moved_bytes:]
    return at
