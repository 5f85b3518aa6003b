"""Micro-batches made ready on the host: ours, by torch and by NVIDIA DALI, and megatron-core's GPTDataset under a plain
torch DataLoader. All read the same samples of the same .bin in the same order, so that their sums must be equal."""

import argparse
import itertools
import tempfile
from pathlib import Path

from benchmarks.alternate import Contestant, alternate
from benchmarks.rows import Row, faster
from benchmarks.worker import WARM_UP_STEPS

SEQUENCE, BATCH = 4096, 16
BATCHES, STEPS = 16, 8
"""Micro-batches of a step, steps of a round."""
H100_TOKENS_PER_SECOND = 60_000
"""What an H100 that trains a model of a billion parameters eats; the aim is ten times that."""
DOCUMENT_TOKENS = 500
"""Mean length of a document."""

BUILDERS = {
    "torch": ("ours", {"loader": "torch", "num_workers": 0}),
    "torch, 1 thread": ("ours", {"loader": "torch", "num_workers": 1}),
    "DALI": ("ours", {"loader": "dali", "num_workers": 0}),
    "DataLoader, 0 workers": ("gpt_dataset", {"num_workers": 0}),
    "DataLoader, 1 worker": ("gpt_dataset", {"num_workers": 1}),
}


def loading(arguments: argparse.Namespace) -> list[Row]:
    """A step makes `BATCHES` micro-batches, from where the last one ended."""
    from scale_llm.data.loader_choice import dali_is_installed

    rounds = max(5, arguments.rounds)
    wanted = (rounds * STEPS + WARM_UP_STEPS + 1) * BATCHES * BATCH * SEQUENCE
    if arguments.million_tokens * 0.95e6 < wanted:
        raise SystemExit(f"--million-tokens={arguments.million_tokens}: {rounds} rounds read {wanted:,}; raise it")
    chosen = {name: builder for name, builder in BUILDERS.items() if name != "DALI" or dali_is_installed()}
    with tempfile.TemporaryDirectory() as directory:
        prefix = f"{directory}/made_text_document"
        write_tokens(prefix, arguments.million_tokens * 1_000_000)
        contestants = [
            Contestant(
                name=name, build=f"benchmarks.data_loading:{function}", steps=STEPS,
                arguments={"prefix": prefix, "cache_dir": directory, **own},
            )
            for name, (function, own) in chosen.items()
        ]  # fmt: skip
        alternate(contestants, rounds=rounds, threads=1)
    if any(contestant.facts != contestants[0].facts for contestant in contestants):
        raise SystemExit("the contestants have not read the same samples")
    rates = {contestant.name: contestant.median_rate for contestant in contestants}
    peers = [name for name in rates if name.startswith("DataLoader")]
    best = max(peers, key=lambda name: rates[name])
    what, limit = f"sequence {SEQUENCE}, batch {BATCH}", "ten times what an H100 eats"
    rows = [
        faster(f"{what}: {name}", rates[name], rates[best], f"GPTDataset, {best}", "tokens/s")
        for name in rates
        if name not in peers
    ]
    return [*rows, faster(f"{what}: torch", rates["torch"], 10 * H100_TOKENS_PER_SECOND, limit, "tokens/s")]


def write_tokens(prefix: str, count: int, seed: int = 5) -> None:
    """About `count` random tokens in documents of lognormal lengths, token 0 at the end of each."""
    import numpy

    from scale_llm.data.megatron import DType, IndexedDatasetBuilder

    draw = numpy.random.default_rng(seed)
    lengths = draw.lognormal(numpy.log(DOCUMENT_TOKENS) - 0.5, 1.0, count // DOCUMENT_TOKENS).astype(numpy.int64) + 2
    tokens = draw.integers(1, 50_000, lengths.sum(), dtype=numpy.uint16)
    tokens[lengths.cumsum() - 1] = 0
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(50_000))
    builder.add_document(tokens, lengths.tolist())
    builder.finalize(f"{prefix}.idx")


def ours(prefix: str, cache_dir: str, loader: str, num_workers: int):
    """Micro-batches of one rank through the loader of a run."""
    import torch

    from scale_llm.config.data import LoaderKind
    from scale_llm.data.loader_choice import build_loader

    stream = _stream(prefix, cache_dir)
    made = build_loader(
        LoaderKind(loader), stream, micro_batch_size=BATCH, data_parallel_rank=0, data_parallel_size=1,
        num_workers=num_workers, device=torch.device("cpu"),
    )  # fmt: skip
    positions = itertools.count(step=BATCHES * BATCH)
    return _step(lambda: made.global_batch(next(positions), BATCHES * BATCH))


def gpt_dataset(prefix: str, cache_dir: str, num_workers: int):
    """megatron-core's own samples of one epoch, which is the order of ours, put together by torch."""
    import torch

    dataset = _stream(prefix, cache_dir).streams[0].epoch(0)
    iterator = iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=num_workers))
    return _step(lambda: itertools.islice(iterator, BATCHES))


def _stream(prefix: str, cache_dir: str):
    from scale_llm.config.data import DataConfig
    from scale_llm.data.datasets import build_dataset
    from scale_llm.data.prepare import PreparedData

    prepared = PreparedData(
        path="", tokenizer_path="", vocab_size=50_000, eod=0, prefixes=[prefix], weights=None, num_documents=0,
        num_tokens=0, num_bytes=None,
    )  # fmt: skip
    data = DataConfig(split="1", cache_dir=cache_dir)
    return build_dataset(prepared, data, split="train", seq_length=SEQUENCE, seed=1, cache_dir=Path(cache_dir))


def _step(next_batches):
    """A step that returns the number of tokens made; before the clock runs, sums of all that is in its batches."""
    number = itertools.count()

    def step():
        batches = list(next_batches())
        if next(number) < WARM_UP_STEPS:
            return {name: float(sum(batch[name].double().sum() for batch in batches)) for name in sorted(batches[0])}
        return sum(batch["tokens"].numel() for batch in batches)

    return step
