"""Which cases of a test `make test` leaves to `make test-slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """All cases for pytest.mark.parametrize, the marker `slow` on those that are not named."""
    found = list(cases)
    unknown = set(quick) - set(found)
    assert not unknown, f"{unknown}: no such cases"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in found]
