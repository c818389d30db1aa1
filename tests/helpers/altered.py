"""A source, a destination and a save with other parts in the place of their own, for as long as they run.

And an object with a method altered, for as long as it is there.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, ClassVar, Self
from unittest.mock import patch

from pageferry.engine import features
from pageferry.engine.destination import Destination
from pageferry.engine.image.save import Save
from pageferry.engine.source import Source


def replaced(parts: Mapping[str, Any]) -> ExitStack:
    """Return a context in which all of the engine has other parts, named as in :class:`AlteredSource`."""
    with ExitStack() as stack:
        for place, part in parts.items():
            stack.enter_context(patch(f"pageferry.engine.{place}", part))
        return stack.pop_all()


class _Altered:
    """Is made and runs with other parts; before the class of the engine among the bases.

    ``parts``, a keyword of the class: each by where the one in whose place it is is looked up, as ``source.Lanes``.
    They come on top of those of the class that it is derived from. All of the process has them meanwhile: of two that
    overlap and have another part in the same place, the second must end first.
    """

    _parts: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init_subclass__(cls, *, parts: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init_subclass__()
        cls._parts = {**cls._parts, **parts}

    @classmethod
    def having(cls, parts: Mapping[str, Any]) -> type[Self]:
        """Return a class with these parts."""
        return type(cls.__name__, (cls,), {}, parts=parts)

    def __init__(self, *args: Any, **options: Any) -> None:
        with self._replaced():
            super().__init__(*args, **options)

    def run(self) -> Any:
        """Do what the class of the engine does, with these parts."""
        with self._replaced():
            return super().run()

    def _replaced(self) -> ExitStack:
        return replaced(self._parts)


class AlteredSource(_Altered, Source):
    """Moves a guest with other parts."""


#: Stands by its word for no longer than it takes on a busy host.
ShortLeased = AlteredSource.having({"source._LEASE_S": 3.0})


class AlteredDestination(_Altered, Destination[Any]):
    """Takes a guest in with other parts."""


class AlteredSave(_Altered, Save):
    """Saves a guest with other parts."""


def lacking(*names: str) -> type[AlteredDestination]:
    """Return a destination that knows nothing of these features, as one of another version of pageferry might."""
    agree = features.agree

    def agree_on_others(offered: Collection[str], **can: bool) -> tuple[str, ...]:
        return agree([each for each in offered if each not in names], **can)

    return AlteredDestination.having({"features.agree": agree_on_others})


def alter(target: object, name: str, wrap: Callable[[Any], Callable[..., Any]]) -> None:
    """Put ``wrap(sound)`` in the place of the method ``name`` of one object.

    Raises:
        AttributeError: the method does not exist any more: the test must follow the implementation.
    """
    setattr(target, name, wrap(getattr(target, name)))
