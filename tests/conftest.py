"""Fixtures that tests of several packages share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: two workers' threads would wait for each other's turns

import pytest
from support.ranks import Ranks
from support.runs import Runs

from scale_llm.parallel import cpu

cpu.adapt()  # before any test imports megatron-core, as on a rank

# Hydra makes a million short-lived objects for a configuration: looking through all of torch's for garbage each time
# took a quarter of that
gc.freeze()
gc.set_threshold(20_000, 20, 20)


LONGEST = ("test_demo.py", "test_sft.py", "test_ppo.py", "test_resume.py", "test_policy_learns.py")
"""Files that are begun first, so that no worker waits for another at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


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


@pytest.fixture(scope="session")
def base(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a pretrained model that knows a little, its tokenizer with them.

    Of small micro-batches: KTO from a base that rounding had made another differed by 3.7e-5 in one metric between two
    layouts after 8 steps of Adam, where 3e-5 are allowed.
    """
    path = tmp_path_factory.mktemp("base") / "run"
    assert runs(path, "train.micro_batch_size=2") == []
    return path / "checkpoints"


@pytest.fixture(scope="session")
def gsm8k() -> str:
    """7,473 questions of grade-school mathematics and their answers, as JSONL."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
    if not path.is_file():
        pytest.skip("real data ../shared/data/gsm8k_train.jsonl is not here")
    return str(path)
