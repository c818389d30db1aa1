"""A console on which text that others made is harmless: a guest's name, a peer's reason, the name of a file."""

import re
from typing import Any

from rich.console import Console

#: C0, DEL, C1, and what turns the direction of writing.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class PlainConsole(Console):
    """Shows control characters of strings that are printed with ``markup=False``, and does not obey them."""

    def print(self, *objects: Any, markup: bool | None = None, **options: Any) -> None:  # noqa: ANN401  # as Console
        """Print, as :class:`rich.console.Console`."""
        if markup is False:
            objects = tuple(printable(each) if isinstance(each, str) else each for each in objects)
        super().print(*objects, markup=markup, **options)


def printable(text: str) -> str:
    """Return a text with its control characters escaped: no terminal obeys it, and it is one line."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
