"""Fixtures that tests of several packages share."""

from collections.abc import Iterator

import pytest
from support.ranks import Ranks
from support.runs import Runs


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Calls a function on N ranks; see support/ranks.py."""
    runner = Ranks()
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Whole runs on a small corpus that is indexed once; see support/runs.py."""
    return Runs(ranks, tmp_path_factory.mktemp("corpus"))
