"""How every command speaks: results on standard output, all else on standard error."""

import json
import re
from contextlib import suppress
from typing import Any

from rich.console import Console

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)


def complain(message: str, hint: str = "") -> None:
    """Print the one line that tells an error, and its hint."""
    ERR.print(f"pageferry: {message}", style="red", markup=False, soft_wrap=True)
    if hint:
        ERR.print(f"hint: {hint}", markup=False, soft_wrap=True)


def tell(message: str) -> None:
    """Print one line of news on standard error, if anybody reads it."""
    with suppress(OSError):  # nobody reads any more; the guest does not care
        ERR.print(f"pageferry: {message}", markup=False, soft_wrap=True)


def print_object(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output; a list of plain numbers is on one line."""
    # A newline cannot be inside a JSON string.
    text = json.dumps(value, indent=2)
    print(re.sub(r"\[\n[-+.eE\d,\s]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text))
