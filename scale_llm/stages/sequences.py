"""The loaders of a stage that trains on whole sequences, packed or padded, of this rank's layout."""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.precision import fp8_unit
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import Batching, SequenceStageConfig
from scale_llm.data.sequence_loader import Batch, SequenceLoader, Shape, TokenSequences
from scale_llm.data.sequence_stream import ROW_UNIT, PackedStream, SequenceStream, SingleStream
from scale_llm.data.units import Units, UnitStream
from scale_llm.parallel.mesh import Mesh


def stream_of(
    stage: SequenceStageConfig, units: Units, row_tokens: int, *, seed: int, end: float = math.inf,
    shuffle: bool = True,
) -> UnitStream:  # fmt: skip
    """Samples as the stage batches them: rows of units, or single ones. end: epochs."""
    stream: SequenceStream
    if stage.batching is Batching.packed:
        stream = PackedStream(units.places, row_tokens, seed=seed, end=end, shuffle=shuffle)
    else:
        stream = SingleStream(len(units), seed=seed, end=end, shuffle=shuffle)
    return UnitStream(stream, units)


def row_unit(cfg: RunConfig, mesh: Mesh) -> int:
    """What the lengths of rows must be divisible by."""
    context = 2 * mesh.sizes.cp if mesh.sizes.cp > 1 else 1
    shares = context * (mesh.sizes.tp if cfg.parallel.sequence_parallel else 1)
    return math.lcm(shares * fp8_unit(cfg.precision), ROW_UNIT)


def shape_of(cfg: RunConfig, mesh: Mesh, **asked: Any) -> Shape:
    """What is asked for, and what the layout demands of every micro-batch."""
    sizes = mesh.sizes
    return Shape(
        multiple=row_unit(cfg, mesh),
        uniform=sizes.pp > 1,
        rows_multiple=sizes.pp if sizes.vpp is not None else 1,
        **asked,
    )


def loader_of(
    cfg: RunConfig, mesh: Mesh, sequences: TokenSequences, stream: SequenceStream, *, row_tokens: int | None = None,
    numbered: bool = False, whole: bool = False, every_token: bool = False,
) -> SequenceLoader:  # fmt: skip
    """This rank's micro-batches. row_tokens: of a packed row, by default model.seq_length; the others: see Shape."""
    stage = cfg.stage
    assert isinstance(stage, SequenceStageConfig)
    shape = shape_of(
        cfg, mesh, batching=stage.batching, row_tokens=row_tokens or cfg.model.seq_length,
        micro_batch_size=cfg.train.micro_batch_size, budget=stage.max_tokens_per_micro_batch or 0, numbered=numbered,
        whole=whole, every_token=every_token,
    )  # fmt: skip
    return SequenceLoader(
        sequences,
        stream,
        shape,
        data_parallel_rank=mesh.dp_rank,
        data_parallel_size=mesh.sizes.dp,
        num_workers=cfg.data.num_workers,
    )


def rows_of(
    cfg: RunConfig, mesh: Mesh, sequences: TokenSequences, samples: list[list[int]], *, row_tokens: int,
    whole: bool = False, every_token: bool = False,
) -> list[Batch]:  # fmt: skip
    """Micro-batches of these samples apart from any stream, for a forward pass: on each data-parallel rank its own.

    samples: sequences that go into one row. row_tokens: of a row at most, but that of the longest sample. Each batch
    says by its `numbers` what it holds. A collective where experts are dealt out over data-parallel ranks.
    """
    longest = max((sum(int(sequences.lengths[number]) for number in sample) for sample in samples), default=1)
    shape = shape_of(
        cfg, mesh, batching=Batching.token_budget, row_tokens=row_tokens, budget=max(row_tokens, longest),
        numbered=True, whole=whole, every_token=every_token,
    )  # fmt: skip

    def made(shape: Shape) -> list[Batch]:
        loader = SequenceLoader(sequences, Listed(samples), shape, data_parallel_rank=0, data_parallel_size=1)
        return loader.global_batch(0, len(samples))

    batches = made(shape)
    wanted = most(len(batches), mesh)
    return batches if len(batches) == wanted else made(replace(shape, rows_multiple=wanted))


def most(count: int, mesh: Mesh) -> int:
    """The largest count of any data-parallel rank where experts are dealt out over these, which then meet in every
    layer; else the rank's own."""
    if mesh.sizes.ep == 1:
        return count
    found = torch.tensor(count)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.host_group)
    return int(found)


class Listed:
    """A stream of given samples."""

    def __init__(self, samples: list[list[int]]):
        self._samples = samples

    def sample(self, index: int) -> list[int]:
        return self._samples[index]

    def samples_in(self, epochs: float) -> int:
        return len(self._samples)
