"""Encoder and Decoder of the libxc migration stream: bytes <-> records, no I/O.

Page data need not pass through here. To send, take the head of a PAGE_DATA record from :meth:`Encoder.page_data` and
send the pages after it straight from guest memory. To receive, make the decoder with ``zero_copy=True``::

    while not decoder.ended:
        event = decoder.next_event()
        if event is NEED_DATA:
            decoder.feed(receive_some(at_most=decoder.wanted_bytes))   # decoder.eof() when the peer is gone
        elif isinstance(event, PageDataHeader):
            receive_exactly(event.payload_bytes, into=guest_pages(event))
            decoder.payload_received()

A caller that never reads more than ``wanted_bytes`` never has page data in a buffer of its own. Garbage either parses
or raises :class:`~pageferry.core.errors.RemoteStreamError`; nothing is allocated by a length that came from the peer
before that length was found to be in bounds.
"""

from pageferry.stream.decoder import Decoder
from pageferry.stream.encoder import Encoder
from pageferry.stream.intake import NEED_DATA

__all__ = ["NEED_DATA", "Decoder", "Encoder"]
