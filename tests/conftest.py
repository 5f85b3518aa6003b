"""Fixtures that tests of several packages share."""

from collections.abc import Iterator

import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Calls a function on N ranks; see support/ranks.py."""
    runner = Ranks()
    yield runner
    runner.close()
