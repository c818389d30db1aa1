"""Which tests ``make test`` runs, and which ``make test-all`` only.

``make test`` is what a contributor runs before each push: every room, one representative of each family of tests, all
bad input. The rest of a family has the marker ``exhaustive``, which says why one is enough.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sample(values: Iterable[Any], why: str, *, quick: Collection[Any]) -> list[Any]:
    """Return ``values`` as parameters; ``make test`` runs those that are also in ``quick``.

    A tuple has one value for each of several names. A test with several such parameters is quick when all of them are.
    """
    values = list(values)
    assert all(value in values for value in quick), f"not among the values: {quick}"
    rest = pytest.mark.exhaustive(why)
    return [
        value if value in quick else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=rest)
        for value in values
    ]
