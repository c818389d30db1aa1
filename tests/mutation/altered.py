"""A source, a destination and a save with faulty parts in the place of sound ones."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar
from unittest.mock import patch

from pageferry.engine.destination import Destination
from pageferry.engine.image.save import Save
from pageferry.engine.source import Source


class _Altered:
    """Is made and runs with faulty parts; before the class of the engine among the bases.

    ``parts``, a keyword of the class: each faulty part by where the sound one is looked up, as ``source.Lanes``. A
    class without it has those of the class that it is derived from.
    """

    _parts: ClassVar[Mapping[str, Any]]

    def __init_subclass__(cls, *, parts: Mapping[str, Any] | None = None) -> None:
        super().__init_subclass__()
        if parts is not None:
            cls._parts = parts

    def __init__(self, *args: Any, **options: Any) -> None:
        with self._replaced():
            super().__init__(*args, **options)

    def run(self) -> Any:
        """Do what the sound one does, less well."""
        with self._replaced():
            return super().run()

    def _replaced(self) -> ExitStack:
        with ExitStack() as stack:
            for place, part in self._parts.items():
                stack.enter_context(patch(f"pageferry.engine.{place}", part))
            return stack.pop_all()


class AlteredSource(_Altered, Source):
    """Moves a guest with faulty parts."""


class AlteredDestination(_Altered, Destination[Any]):
    """Takes a guest in with faulty parts."""


class AlteredSave(_Altered, Save):
    """Saves a guest with faulty parts."""
