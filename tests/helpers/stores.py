"""The pages that a guest of the KVM tests has stored to, out of what a tracker reports.

KVM maps a page that is first *read* writable, and says that it is dirty: under shadow paging when the guest's entry for
the page has its dirty bit, under nested paging always. So a guest's stores and its program lie in different 2 MiB pages
of the guest where a test expects an exact set.
"""

#: Pages that may be reported besides: the guest's page tables (accessed bits, AMD nested paging), and under nested
#: paging its program's, and that of its task state segment, at which the processor looks when the guest uses a port.
NO_STORES = frozenset(range(0x10, 0x19)) | {0x100, 0}


def stored(bitmap):
    """Return the frames that the guest has stored to."""
    return set(bitmap.gfns().tolist()) - NO_STORES
