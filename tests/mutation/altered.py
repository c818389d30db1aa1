"""Altered: a destination one of whose parts is a faulty one."""

from typing import Any, ClassVar
from unittest.mock import patch

from pageferry.engine.destination import Destination


class Altered(Destination[Any]):
    """Takes a guest in with a faulty ``part`` where the sound one is made: ``place``, a module of the engine's."""

    place: ClassVar[str] = "destination"
    part: ClassVar[type]

    def run(self) -> Any:
        """Take the guest in."""
        sound = self.part.__mro__[1]
        with patch(f"pageferry.engine.{self.place}.{sound.__name__}", self.part):
            return super().run()
