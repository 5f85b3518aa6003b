"""Global batches as sets do not depend on data-parallel size, and any position can be resumed."""

import pytest
import torch

from scale_llm.config.data import DataConfig
from scale_llm.data.datasets import SampleStream, build_dataset
from scale_llm.data.loader import Loader
from scale_llm.data.prepare import PreparedData


@pytest.fixture(scope="module")
def stream(embedded: PreparedData, embedded_config: DataConfig, cache) -> SampleStream:
    """Several epochs, so that batches and prefetching cross their bounds."""
    arguments = {"split": "validation", "seq_length": 64, "seed": 3, "cache_dir": cache}
    epoch = len(build_dataset(embedded, embedded_config, **arguments))
    return build_dataset(embedded, embedded_config, num_samples=3 * epoch, **arguments)


def batches(stream: SampleStream, consumed: int, size: int, *, dp: int, mbs: int, workers: int = 0):
    """All micro-batches of a global batch in the order of samples: the first of every rank, the second..."""
    loaders = [
        Loader(stream, micro_batch_size=mbs, data_parallel_rank=rank, data_parallel_size=dp, num_workers=workers)
        for rank in range(dp)
    ]
    per_rank = [list(loader.global_batch(consumed, size)) for loader in loaders]
    for loader in loaders:
        loader.close()
    return [batch for step in zip(*per_rank, strict=True) for batch in step]


@pytest.mark.parametrize(("dp", "mbs"), [(1, 2), (2, 2), (4, 2), (1, 8), (2, 1)])
def test_global_batch_is_the_same_for_any_layout(stream: SampleStream, dp: int, mbs: int):
    """Not only as a set: read in step order, the ranks' micro-batches are the stream itself."""
    expected = torch.stack([stream[16 + i]["tokens"] for i in range(16)])
    found = batches(stream, 16, 16, dp=dp, mbs=mbs)
    assert all(batch["tokens"].shape == (mbs, 64) for batch in found)
    assert torch.equal(torch.cat([batch["tokens"] for batch in found]), expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_prefetching_changes_nothing(stream: SampleStream, workers: int):
    """Ramp-up of the batch size, a jump backwards, a jump forwards, and the end of the stream."""
    end = len(stream) // 4 * 4
    steps = [(0, 4), (4, 4), (8, 8), (16, 16), (4, 8), (end - 8, 4), (end - 4, 4)]
    arguments = {"micro_batch_size": 2, "data_parallel_rank": 1, "data_parallel_size": 2}
    plain, ahead = Loader(stream, **arguments), Loader(stream, num_workers=workers, **arguments)
    for consumed, size in steps:
        pairs = list(zip(plain.global_batch(consumed, size), ahead.global_batch(consumed, size), strict=True))
        assert len(pairs) == size // 4
        for a, b in pairs:
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    ahead.close()


def test_errors_of_workers_reach_the_caller(stream: SampleStream):
    loader = Loader(stream, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1, num_workers=1)
    with pytest.raises(IndexError):
        list(loader.global_batch(len(stream), 2))
    loader.close()


def test_batch_that_does_not_divide(stream: SampleStream):
    loader = Loader(stream, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=2)
    with pytest.raises(AssertionError, match="multiple"):
        list(loader.global_batch(0, 6))
