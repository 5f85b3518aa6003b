"""One cluster for all tests of this directory; skipped, with the reason, where none can be started."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import Runs
from support.slurm import Cluster, NoSlurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    try:
        running = Cluster()
        running.start()
    except NoSlurm as reason:
        pytest.skip(f"no Slurm: {reason}")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def uninterrupted(runs: Runs, top: Path) -> Path:
    """The same run on two ranks of this machine, without Slurm and without interruption; makes the data, too."""
    directory = top / "uninterrupted"
    runs.command(directory, "cluster.nproc_per_node=2")
    return directory
