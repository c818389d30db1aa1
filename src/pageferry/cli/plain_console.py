"""A console on which text that others made is harmless: a guest's name, a peer's reason, the name of a file."""

from typing import Any

from rich.console import Console

from pageferry.cli.printable import printable


class PlainConsole(Console):
    """Shows control characters of strings that are printed with ``markup=False``, and does not obey them."""

    def print(self, *objects: Any, markup: bool | None = None, **options: Any) -> None:  # noqa: ANN401  # as Console
        """Print, as :class:`rich.console.Console`."""
        if markup is False:
            objects = tuple(printable(each) if isinstance(each, str) else each for each in objects)
        super().print(*objects, markup=markup, **options)
