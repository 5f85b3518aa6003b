"""Ranks on one GPU. Nothing here needs more than torch, megatron-core, Hydra, and Transformer Engine where it is asked
for: `python -m pytest -m gpu tests`."""

import importlib.metadata
from collections.abc import Iterator

import pytest
from support.ranks import Ranks
from support.runs import Runs


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[Ranks]:
    """Calls a function on the rank of a GPU; see support/ranks.py."""
    runner = Ranks("cuda")
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def gpu_runs(ranks: Ranks, runs: Runs) -> Runs:
    """Whole runs on a GPU, by the command line; on the data of `runs`."""
    return Runs(ranks, runs.cache, "cuda")


@pytest.fixture(params=["torch", "transformer_engine"])
def backend(request: pytest.FixtureRequest) -> dict[str, str]:
    """What says of which layers the model is."""
    if request.param == "transformer_engine":
        try:
            importlib.metadata.version("transformer-engine")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("Transformer Engine is not installed: pip install .[gpu]")
    return {"model.backend": request.param}
