"""The loaders of a stage that trains on whole sequences, packed or padded, of this rank's layout."""

import math
from dataclasses import dataclass

import numpy as np

from scale_llm.config.peft import PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import Batching, SftConfig
from scale_llm.data.sequence_loader import SequenceLoader, Shape, TokenSequence, TokenSequences
from scale_llm.data.sequence_stream import ROW_UNIT, PackedStream, SequenceStream, SingleStream
from scale_llm.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Prefixed:
    """A sequence after virtual tokens, none of which the loss counts."""

    tokens: np.ndarray
    trained: np.ndarray
    weight: float


class Subset:
    """Some of the sequences, renumbered, each after the same virtual tokens."""

    def __init__(self, sequences: TokenSequences, numbers: np.ndarray, prefix: np.ndarray):
        self._sequences, self._numbers, self._prefix = sequences, numbers, prefix
        self.lengths = np.asarray(sequences.lengths)[numbers] + len(prefix)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> TokenSequence:
        found = self._sequences[int(self._numbers[index])]
        if not len(self._prefix):
            return found
        trained = np.concatenate([np.zeros(len(self._prefix), dtype=bool), found.trained])
        return Prefixed(np.concatenate([self._prefix, found.tokens]), trained, found.weight)


def virtual_tokens(cfg: RunConfig, vocab_size: int) -> np.ndarray:
    """Token ids of prompt tuning's vectors: those after the vocabulary."""
    count = cfg.peft.num_virtual_tokens if cfg.peft.method is PeftMethod.prompt_tuning else 0
    return np.arange(vocab_size, vocab_size + count)


def stream_of(
    stage: SftConfig, lengths: np.ndarray, row_tokens: int, *, seed: int, end: float = math.inf, shuffle: bool = True
) -> SequenceStream:
    """Samples as the stage batches them: rows of sequences, or single ones. One of l tokens takes l - 1 places."""
    if stage.batching is Batching.packed:
        return PackedStream(lengths - 1, row_tokens, seed=seed, end=end, shuffle=shuffle)
    return SingleStream(len(lengths), seed=seed, end=end, shuffle=shuffle)


def loader_of(cfg: RunConfig, mesh: Mesh, sequences: TokenSequences, stream: SequenceStream) -> SequenceLoader:
    """This rank's micro-batches."""
    stage, sizes = cfg.stage, mesh.sizes
    assert isinstance(stage, SftConfig)
    context = 2 * sizes.cp if sizes.cp > 1 else 1
    shape = Shape(
        batching=stage.batching,
        row_tokens=cfg.model.seq_length,
        micro_batch_size=cfg.train.micro_batch_size,
        budget=stage.max_tokens_per_micro_batch or 0,
        multiple=math.lcm(context * (sizes.tp if cfg.parallel.sequence_parallel else 1), ROW_UNIT),
        uniform=sizes.pp > 1,
        rows_multiple=sizes.pp if sizes.vpp is not None else 1,
    )
    return SequenceLoader(
        sequences,
        stream,
        shape,
        data_parallel_rank=mesh.dp_rank,
        data_parallel_size=sizes.dp,
        num_workers=cfg.data.num_workers,
    )
