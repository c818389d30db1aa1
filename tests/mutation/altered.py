"""Altered: a destination one of whose parts is a faulty one."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

from pageferry.core.events import MigrationReport
from pageferry.engine.destination import Destination
from pageferry.engine.image.save import Save
from pageferry.engine.source import Source


class Altered(Destination[Any]):
    """Takes a guest in with a faulty ``part`` where the sound one is made: ``place``, a module of the engine's."""

    place: ClassVar[str] = "destination"
    part: ClassVar[type]

    def run(self) -> Any:
        """Take the guest in."""
        sound = self.part.__mro__[1]
        with patch(f"pageferry.engine.{self.place}.{sound.__name__}", self.part):
            return super().run()


class AlteredSource(Source):
    """Moves a guest with faulty ``parts`` in the place of sound ones: by where they are looked up in the engine."""

    _parts: ClassVar[Mapping[str, Any]]

    def __init_subclass__(cls, *, parts: Mapping[str, Any] | None = None) -> None:
        """Name the parts; None: those of the class that this one is derived from."""
        if parts is not None:
            cls._parts = parts

    def __init__(self, *args: Any, **options: Any) -> None:
        with replaced(self._parts):
            super().__init__(*args, **options)

    def run(self) -> MigrationReport:
        """Move the guest."""
        with replaced(self._parts):
            return super().run()


class AlteredSave(Save):
    """Saves a guest with faulty ``parts``, as :class:`AlteredSource` moves one."""

    _parts: ClassVar[Mapping[str, Any]]

    def __init_subclass__(cls, *, parts: Mapping[str, Any] | None = None) -> None:
        """Name the parts; None: those of the class that this one is derived from."""
        if parts is not None:
            cls._parts = parts

    def run(self) -> MigrationReport:
        """Save the guest."""
        with replaced(self._parts):
            return super().run()


@contextmanager
def replaced(parts: Mapping[str, Any]) -> Iterator[None]:
    """Have parts of the engine replaced for the length of a ``with`` block."""
    with ExitStack() as stack:
        for place, part in parts.items():
            stack.enter_context(patch(f"pageferry.engine.{place}", part))
        yield
