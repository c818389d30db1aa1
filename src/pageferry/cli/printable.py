"""Makes text that others made harmless on a terminal: a guest's name, a peer's reason, the name of a file."""

import re

#: C0, DEL, C1, and what turns the direction of writing.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text with its control characters escaped: no terminal obeys it, and it is one line."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
