"""Global batches do not depend on data-parallel size or loader, and any position can be resumed."""

import random
from collections import Counter

import numpy
import pytest
import torch

from scale_llm.config.batch import global_batch_size
from scale_llm.config.data import DataConfig, LoaderKind
from scale_llm.config.train import TrainConfig
from scale_llm.config.validate_values import loader_problems
from scale_llm.data.batches import BatchMaker
from scale_llm.data.datasets import SampleStream, build_dataset
from scale_llm.data.loader import Batch
from scale_llm.data.loader_choice import build_loader, dali_is_installed, takes_dali
from scale_llm.data.prepare import PreparedData

SEQ = 64


@pytest.fixture(params=[LoaderKind.torch, LoaderKind.dali], ids=lambda kind: kind.value)
def kind(request: pytest.FixtureRequest) -> LoaderKind:
    if request.param is LoaderKind.dali and not dali_is_installed():
        pytest.skip("NVIDIA DALI is not installed: pip install '.[dali]'")
    return request.param


@pytest.fixture(scope="module")
def stream(embedded: PreparedData, embedded_config: DataConfig, cache) -> SampleStream:
    """Several epochs, so that batches and prefetching cross their bounds."""
    arguments = {"split": "validation", "seq_length": SEQ, "seed": 3, "cache_dir": cache}
    epoch = len(build_dataset(embedded, embedded_config, **arguments))
    return build_dataset(embedded, embedded_config, num_samples=12 * epoch, **arguments)


def make(kind: LoaderKind, stream: SampleStream, *, mbs: int = 2, rank: int = 0, dp: int = 1, workers: int = 0):
    return build_loader(
        kind, stream, micro_batch_size=mbs, data_parallel_rank=rank, data_parallel_size=dp, num_workers=workers,
        device=torch.device("cpu"),
    )  # fmt: skip


def batches(kind: LoaderKind, stream: SampleStream, consumed: int, size: int, *, dp: int, mbs: int) -> list[Batch]:
    """All micro-batches of a global batch in the order of samples: the first of every rank, the second..."""
    loaders = [make(kind, stream, mbs=mbs, rank=rank, dp=dp) for rank in range(dp)]
    per_rank = [list(loader.global_batch(consumed, size)) for loader in loaders]
    for loader in loaders:
        loader.close()
    return [batch for step in zip(*per_rank, strict=True) for batch in step]


def wanted(stream: SampleStream, start: int, count: int) -> Batch:
    """The slow twin: samples one by one."""
    samples = [stream[index] for index in range(start, start + count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def same(a: Batch, b: Batch) -> bool:
    """Bit for bit, types and layout in memory too."""
    alike = all(a[key].dtype == b[key].dtype and a[key].is_contiguous() for key in a)
    return a.keys() == b.keys() and alike and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("dp", "mbs"), [(1, 2), (2, 2), (4, 2), (1, 8), (2, 1)])
def test_global_batch_is_the_same_for_any_layout(kind: LoaderKind, stream: SampleStream, dp: int, mbs: int):
    """Not only as a set: read in step order, the ranks' micro-batches are the stream itself."""
    found = batches(kind, stream, 16, 16, dp=dp, mbs=mbs)
    assert all(batch["tokens"].shape == (mbs, SEQ) for batch in found)
    assert same({key: torch.cat([batch[key] for batch in found]) for key in found[0]}, wanted(stream, 16, 16))


def test_an_epoch_holds_every_sample_once(kind: LoaderKind, stream: SampleStream):
    """Four ranks together, each of its own loader, over the first epoch: the tokens of the split, each once."""
    epoch, source = stream.samples_per_epoch // 4 * 4, stream.streams[0]
    found = [batch["tokens"] for at in range(0, epoch, 4) for batch in batches(kind, stream, at, 4, dp=4, mbs=1)]
    rows = [tuple(row) for row in torch.cat(found).tolist()]
    text = numpy.concatenate([source.tokens[int(document)] for document in source.epoch(0).document_index])
    windows = [tuple(text[at : at + SEQ].tolist()) for at in range(0, len(text) - SEQ, SEQ)]
    assert len(rows) == epoch > len(windows) - 4 and not Counter(rows) - Counter(windows)


def test_any_position_can_be_resumed(kind: LoaderKind, stream: SampleStream):
    """Fifty random places, with batch sizes that differ: one loader jumps, another begins there."""
    draw = random.Random(7)
    travelled = make(kind, stream, rank=1, dp=2, workers=1)
    for _ in range(50):
        size = draw.choice([4, 8, 12])
        consumed = draw.randrange(len(stream) - size)
        found = list(travelled.global_batch(consumed, size))
        expected = [wanted(stream, consumed + 2 + 4 * step, 2) for step in range(size // 4)]
        assert all(same(a, b) for a, b in zip(found, expected, strict=True)), consumed
    travelled.close()
    for consumed in (draw.randrange(len(stream) - 4) for _ in range(5)):
        fresh = make(kind, stream, rank=1, dp=2)
        assert same(next(fresh.global_batch(consumed, 4)), wanted(stream, consumed + 2, 2))
        fresh.close()


def test_a_run_whose_batches_grow_reads_on_without_a_gap(kind: LoaderKind, stream: SampleStream):
    """Ramp-up as the loop has it; a resume in the middle of it goes on with the same samples."""
    train = TrainConfig(global_batch_size=24, rampup_batch_size=[8, 8, 64])
    ahead, resumed = make(kind, stream, workers=2), make(kind, stream)
    consumed, sizes = 0, []
    while consumed < 200:
        size = global_batch_size(train, consumed)
        rows = torch.cat([batch["tokens"] for batch in ahead.global_batch(consumed, size)])
        assert torch.equal(rows, wanted(stream, consumed, size)["tokens"])
        if consumed > 32:
            assert torch.equal(next(resumed.global_batch(consumed, size))["tokens"], rows[:2])
        consumed, sizes = consumed + size, [*sizes, size]
    assert sizes[0] == 8 and 16 in sizes and sizes[-1] == 24
    ahead.close()
    resumed.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_jumps_and_the_end_of_the_stream(kind: LoaderKind, stream: SampleStream, workers: int):
    end = len(stream) // 4 * 4
    loader = make(kind, stream, rank=1, dp=2, workers=workers)
    for consumed, size in [(0, 4), (4, 4), (8, 8), (16, 16), (4, 8), (end - 8, 4), (end - 4, 4), (0, 4)]:
        found = list(loader.global_batch(consumed, size))
        expected = [wanted(stream, consumed + 2 + 4 * step, 2) for step in range(size // 4)]
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    loader.close()


def test_batches_do_not_share_memory_with_what_comes_next(kind: LoaderKind, stream: SampleStream):
    """A step keeps all its micro-batches, while whoever loads them goes on."""
    loader = make(kind, stream, mbs=1)
    kept = list(loader.global_batch(0, 8))
    list(loader.global_batch(8, 16))
    assert all(same(batch, wanted(stream, place, 1)) for place, batch in enumerate(kept))
    assert all(batch["tokens"].data_ptr() != batch["labels"].data_ptr() for batch in kept)
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_caller(kind: LoaderKind, stream: SampleStream, workers: int):
    loader = make(kind, stream, workers=workers)
    with pytest.raises(IndexError):
        list(loader.global_batch(len(stream), 2))
    loader.close()


def test_batch_that_does_not_divide(kind: LoaderKind, stream: SampleStream):
    with pytest.raises(AssertionError, match="multiple"):
        list(make(kind, stream, dp=2).global_batch(0, 6))


@pytest.mark.parametrize("reset", [False, True])
def test_documents_that_end_in_every_place(embedded: PreparedData, reset: bool):
    """Whole rows against megatron-core's masks and positions, sample by sample; ends at borders, one after another."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(5, (64, 17), generator=draw)
    rows[0], rows[1] = 0, 1
    batch = BatchMaker(eod=0, reset_position_ids=reset, reset_attention_mask=reset, eod_mask_loss=reset)(rows)
    for number, row in enumerate(rows):
        mask, loss_mask, places = _get_ltor_masks_and_position_ids(row[:-1], 0, reset, reset, reset, reset)
        assert torch.equal(batch["loss_mask"][number], loss_mask) and torch.equal(batch["position_ids"][number], places)
        assert torch.equal(batch["tokens"][number], row[:-1]) and torch.equal(batch["labels"][number], row[1:])
        assert not reset or torch.equal(batch["attention_mask"][number], mask)


def test_dali_is_refused_where_it_is_not():
    problems = loader_problems(DataConfig(loader=LoaderKind.dali))
    assert problems == [] if dali_is_installed() else "pip install" in problems[0]
    assert loader_problems(DataConfig()) == []


def test_who_loads():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert not takes_dali(LoaderKind.auto, cpu) and takes_dali(LoaderKind.auto, gpu) == dali_is_installed()
    assert takes_dali(LoaderKind.dali, cpu) and not takes_dali(LoaderKind.torch, gpu)
