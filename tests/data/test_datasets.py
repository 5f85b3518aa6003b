"""The stream of samples: what is in one, and that it depends on the data, the seed and the place alone."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from scale_llm.config.data import DataConfig
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data import source_stream
from scale_llm.data.datasets import SampleStream, build_dataset
from scale_llm.data.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset
from scale_llm.data.prepare import PreparedData, check_splits, prepare
from scale_llm.data.splits import SPLITS, split_ranges

SEQ = 32


def build(prepared: PreparedData, data: DataConfig, cache: Path, **changes) -> SampleStream:
    arguments = {
        "split": "train",
        "seq_length": SEQ,
        "seed": 7,
        "num_samples": None,
        "cache_dir": cache,
    } | changes
    return build_dataset(prepared, data, **arguments)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="session")
def blends(
    web: str, shakespeare: str, embedded: PreparedData, cache: Path
) -> dict[str, tuple[DataConfig, PreparedData]]:
    """The same three sources unweighted and weighted."""
    tokenizer = TokenizerConfig(path=embedded.tokenizer_path)
    configs = {
        "plain": DataConfig(path=[web, shakespeare, embedded.prefixes[0]], split="80,10,10"),
        "weighted": DataConfig(path=[0.5, web, 0.2, shakespeare, 0.3, embedded.prefixes[0]], split="80,10,10"),
    }
    return {name: (config, prepare(config, tokenizer, cache)) for name, config in configs.items()}


def test_a_sample(embedded: PreparedData, embedded_config: DataConfig, cache: Path):
    stream = build(embedded, embedded_config, cache)
    sample = stream[0]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in sample.items()} == {
        "tokens": (torch.int64, (SEQ,)),
        "labels": (torch.int64, (SEQ,)),
        "loss_mask": (torch.float32, (SEQ,)),
        "position_ids": (torch.int64, (SEQ,)),
    }
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert torch.equal(sample["position_ids"], torch.arange(SEQ)) and sample["loss_mask"].all()


def test_an_epoch_holds_every_token_once(embedded: PreparedData, embedded_config: DataConfig, cache: Path):
    """In the order of the text the samples of an epoch are its documents; only the last tokens are lost."""
    stream = build(embedded, embedded_config, cache, split="validation")
    epoch = stream.streams[0].epoch(0)
    tokens = IndexedDataset(embedded.prefixes[0])
    text = numpy.concatenate([tokens[int(document)] for document in epoch.document_index])
    in_order = numpy.argsort(epoch.shuffle_index)
    rows = numpy.stack([stream[int(place)]["tokens"].numpy() for place in in_order])
    assert len(rows) == len(stream) == (len(text) - 1) // SEQ
    assert numpy.array_equal(rows.reshape(-1), text[: rows.size])


@pytest.mark.parametrize("kind", ["embedded", "plain", "weighted"])
def test_samples_do_not_depend_on_the_number_asked_for(kind, blends, embedded, embedded_config, cache):
    config, prepared = blends.get(kind, (embedded_config, embedded))
    few = build(prepared, config, cache, num_samples=10)
    many = build(prepared, config, cache, num_samples=50_000)
    beyond = few.samples_per_epoch + 3
    assert beyond < 50_000
    longer = build(prepared, config, cache, num_samples=beyond + 1)
    assert all(same(few[i], many[i]) for i in range(10))
    assert same(longer[beyond], many[beyond])
    with pytest.raises(IndexError):
        few[10]


@pytest.mark.parametrize("kind", ["embedded", "plain"])
def test_each_epoch_holds_every_sample_once_in_its_own_order(kind, blends, embedded, embedded_config, cache):
    config, prepared = blends.get(kind, (embedded_config, embedded))
    epoch = build(prepared, config, cache, split="validation").samples_per_epoch
    stream = build(prepared, config, cache, split="validation", num_samples=2 * epoch)
    asked: list[list[tuple[str, int]]] = [[], []]
    for index in range(2 * epoch):
        source, within = stream._find(index)
        number, place = divmod(within, source.samples_per_epoch)
        asked[number].append((source.prefix, int(source.epoch(number).shuffle_index[place])))
    assert len(asked[0]) == len(asked[1]) == epoch
    assert len(set(asked[0])) == len(set(asked[1])) == epoch
    plain = build(prepared, config, cache, split="validation", num_samples=2 * epoch)
    first, second = ([plain[e * epoch + i]["tokens"].tolist() for i in range(epoch)] for e in range(2))
    assert first != second


def test_first_epoch_is_megatrons_own_order(embedded: PreparedData, embedded_config: DataConfig, cache: Path, tmp_path):
    """The slow twin: megatron-core's builder, asked for one epoch of every split."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    streams = [build(embedded, embedded_config, cache, split=name) for name in SPLITS]
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=SEQ, blend=(embedded.prefixes, None), split=embedded_config.split,
        path_to_cache=str(tmp_path), tokenizer=streams[0].streams[0].config.tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config).build()
    for ours, their in zip(streams, theirs, strict=True):
        assert len(ours) == len(their)
        assert all(same(ours[i], their[i]) for i in range(len(ours)))


@pytest.mark.parametrize("split", ["949,50,1", "80,10,10", "1", "1,1", "0.9,0.1,0"])
@pytest.mark.parametrize("documents", [1, 7, 105, 1000])
def test_splits_adjoin(split: str, documents: int):
    ranges = list(split_ranges(split, documents).values())
    assert ranges[0][0] == 0 and ranges[-1][1] == documents
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))


def test_weights_hold_at_every_prefix_of_the_blend(blends, cache: Path):
    config, prepared = blends["weighted"]
    stream = build(prepared, config, cache, num_samples=5000)
    for size in (10, 100, 5000):
        counts = numpy.bincount(stream._which[:size], minlength=3)
        assert numpy.abs(counts - size * numpy.array([0.5, 0.2, 0.3])).max() <= 2


def test_seed_changes_the_order(embedded: PreparedData, embedded_config: DataConfig, cache: Path):
    a, b = (build(embedded, embedded_config, cache, seed=seed) for seed in (1, 2))
    assert any(not same(a[i], b[i]) for i in range(5))


def test_document_ends(embedded: PreparedData, cache: Path):
    """After an end of document positions begin anew, nothing attends back, its prediction has no weight."""
    data = DataConfig(split="80,10,10", reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    stream = build(embedded, data, cache, num_samples=3000)
    sample = next(s for s in (stream[i] for i in range(3000)) if embedded.eod in s["tokens"][4:-4])
    ends = (sample["tokens"] == embedded.eod).nonzero().flatten().tolist()
    document = torch.tensor([sum(end < place for end in ends) for place in range(SEQ)])
    allowed = (document[:, None] == document[None, :]).tril()
    assert torch.equal(sample["attention_mask"], ~allowed[None])
    starts = torch.tensor([0] + [end + 1 for end in ends])
    assert torch.equal(sample["position_ids"], torch.arange(SEQ) - starts[document])
    assert torch.equal(sample["loss_mask"] == 0, sample["tokens"] == embedded.eod)


def test_mapped_indices_equal_those_in_memory(blends, embedded, embedded_config, tmp_path: Path, monkeypatch):
    """Large indices go through files, which a second build maps and does not write again."""
    cases = [(embedded_config, embedded), *blends.values()]
    in_memory = [build(prepared, config, tmp_path, num_samples=500) for config, prepared in cases]
    monkeypatch.setattr(source_stream, "SMALL", 0)
    for _ in range(2):
        for expected, (config, prepared) in zip(in_memory, cases, strict=True):
            mapped = build(prepared, config, tmp_path, num_samples=500)
            assert all(same(expected[i], mapped[i]) for i in range(0, 500, 7))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(written) >= 5 and not list(tmp_path.rglob("*.tmp-*"))
    build(embedded, embedded_config, tmp_path, num_samples=500)[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == written


def test_split_without_samples(shakespeare: str, cache: Path, tokenizer_config):
    data = DataConfig(path=shakespeare, split="998,1,1")
    prepared = prepare(data, tokenizer_config, cache)
    problems = check_splits(prepared, data, seq_length=100_000)
    assert len(problems) == 2
    for name, problem in zip(("validation", "test"), problems, strict=True):
        assert f"the {name} split" in problem and "100001" in problem and "data.split" in problem
    assert check_splits(prepared, data, seq_length=64, splits=("train",)) == []
    with pytest.raises(UserError, match="the test split .* tokens"):
        build(prepared, data, cache, split="test", seq_length=100_000)


def test_in_a_process_group(embedded: PreparedData, tmp_path: Path):
    """Ranks build and map indices without collectives: rank 1 alone, then both, all alike."""
    code = """
import sys, torch, torch.distributed as dist, json
from scale_llm.config.data import DataConfig
from scale_llm.data import source_stream
from scale_llm.data.datasets import build_dataset
from scale_llm.data.prepare import load_prepared
source_stream.SMALL = 0
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3] + "/store", rank=rank, world_size=2)
def build(seed):
    return build_dataset(load_prepared(sys.argv[2]), DataConfig(split="80,10,10"), split="train",
    seq_length=32,
                         seed=seed, num_samples=20000, cache_dir=sys.argv[3])
if rank == 1:
    build(1)[0]
dist.barrier()
stream = build(1)
mine = torch.cat([stream[i]["tokens"] for i in (0, 5, 19999)] + [build(2)[3]["tokens"]])
both = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
assert torch.equal(*both)
dist.barrier()
dist.destroy_process_group()
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), embedded.path, str(tmp_path)],
            cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path):
        self._marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self._marker,)


def test_a_cached_index_is_read_as_numbers_alone(
    embedded: PreparedData, embedded_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is pickled in place of one is not run; the error says what to do, and doing it helps."""
    monkeypatch.setattr(source_stream, "SMALL", 0)
    first = build(embedded, embedded_config, tmp_path)[3]
    index = next(tmp_path.rglob("*document_index.npy"))
    index.write_bytes(pickle.dumps(Bomb(tmp_path / "run")))
    with pytest.raises(UserError, match="is no array of numbers.*delete it") as raised:
        build(embedded, embedded_config, tmp_path)[3]
    assert str(index) in str(raised.value) and not (tmp_path / "run").exists()
    index.unlink()
    assert same(build(embedded, embedded_config, tmp_path)[3], first)
