"""Arguments of a QMP command, taken out one by one with their types."""

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pageferry.core.paths import absolute
from pageferry.vmm.qmp_error import QmpError

Choice = TypeVar("Choice", bound=StrEnum)

_FILE = "file:"


def file_uri(path: Path) -> str:
    """Return what names a file in ``migrate``, as QEMU does."""
    return f"{_FILE}{absolute(path)}"


def saved_to(uri: str) -> Path | None:
    """Return the file that a ``file:`` URI names, or None: it is the address of a process.

    Raises:
        QmpError: it names no absolute path.
    """
    if not uri.startswith(_FILE):
        return None
    path = Path(uri.removeprefix(_FILE))
    if not path.is_absolute() or "\0" in uri:
        raise QmpError(f"not a file: {uri!r}", hint="write file:/absolute/path")
    return path


def _is_positive(value: Any) -> bool:  # noqa: ANN401  # any JSON value
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


class Arguments:
    """What a client sent; what no handler took is an error, as in QEMU.

    Args:
        values: the command's ``arguments`` object.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = dict(values)

    def peek(self, name: str) -> Any:  # noqa: ANN401  # any JSON value
        """Return a value and leave it there; None if it is missing."""
        return self._values.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string.

        Raises:
            QmpError: missing without a default, or no string.
        """
        value = self._values.pop(name, default)
        if value is None:
            raise QmpError(f"Parameter '{name}' is missing")
        if not isinstance(value, str):
            raise QmpError(f"Invalid parameter type for '{name}', expected: string")
        return value

    def path(self, name: str) -> Path | None:
        """Return an absolute path, or None when it is missing or null.

        Raises:
            QmpError: it is something else.
        """
        text = self.text(name, "")
        if not text:
            return None
        if not text.startswith("/") or "\0" in text:
            raise QmpError(f"Invalid parameter '{name}', expected: an absolute path")
        return Path(text)

    def number(self, name: str) -> float | None:
        """Return a positive, finite number, or None when it is missing or null.

        Raises:
            QmpError: it is something else.
        """
        value = self._optional(name, "positive number", _is_positive)
        return None if value is None else float(value)

    def integer(self, name: str) -> int | None:
        """Return a positive integer, or None when it is missing or null.

        Raises:
            QmpError: it is something else.
        """
        value: int | None = self._optional(name, "positive integer", lambda v: type(v) is int and v > 0)
        return value

    def count(self, name: str) -> int | None:
        """Return an integer that is not negative, or None when it is missing or null.

        Raises:
            QmpError: it is something else.
        """
        value: int | None = self._optional(name, "integer, 0 or more", lambda v: type(v) is int and v >= 0)
        return value

    def choice(self, name: str, kind: type[Choice]) -> Choice | None:
        """Return one of an enumeration's values, or None when it is missing or null.

        Raises:
            QmpError: it is none of them.
        """
        value = self._values.pop(name, None)
        if value is None:
            return None
        try:
            return kind(value)
        except ValueError as error:
            hint = f"one of {', '.join(kind)}"
            raise QmpError(f"Parameter '{name}' does not accept value '{value}'", hint=hint) from error

    def flag(self, name: str) -> bool:
        """Return a boolean, False when it is missing.

        Raises:
            QmpError: it is something else.
        """
        value = self._values.pop(name, False)
        if not isinstance(value, bool):
            raise QmpError(f"Invalid parameter type for '{name}', expected: boolean")
        return value

    def array(self, name: str) -> list[Any]:
        """Return an array.

        Raises:
            QmpError: it is missing, or something else.
        """
        value = self._values.pop(name, None)
        if not isinstance(value, list):
            raise QmpError(f"Invalid parameter type for '{name}', expected: array")
        return value

    def fill_in(self, values: dict[str, Any]) -> None:
        """Add values where none was sent, as if they had been."""
        self._values = values | self._values

    def expect_only(self, names: Sequence[str], what: str) -> None:
        """Check that nothing but these is there.

        Raises:
            QmpError: something is; ``what`` it is not.
        """
        for name in self._values:
            if name not in names:
                raise QmpError(f"there is no {what} '{name}' here", hint=f"there are: {', '.join(names)}")

    def done(self) -> None:
        """Check that nothing is left.

        Raises:
            QmpError: a parameter was not expected.
        """
        for name in self._values:
            raise QmpError(f"Parameter '{name}' is unexpected")

    def _optional(self, name: str, expected: str, fits: Callable[[Any], bool]) -> Any:  # noqa: ANN401  # as it fits
        value = self._values.pop(name, None)
        if value is not None and not fits(value):
            raise QmpError(f"Invalid parameter type for '{name}', expected: {expected}")
        return value
