"""A witness beside the tracker (``--oracle``): it names each page whose dirty bit was lost, and the migration fails.

The witness is a second tracker on the same guest, or digests of all its pages. :mod:`.machines` makes machines whose
tracker has one, :mod:`.cross_check` cleans both and reads pages, :mod:`.contents` tells which pages changed between two
readings, and :mod:`.ledger` decides from that what is a loss.
"""

DIGESTS = "digests"
"""The witness that is not a tracker."""
