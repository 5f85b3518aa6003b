"""The loaders of a stage that trains on whole sequences, packed or padded, of this rank's layout."""

import math
from dataclasses import dataclass

import numpy as np

from scale_llm.config.peft import PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import Batching, SequenceStageConfig
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


class Members:
    """Comparisons: which sequences each has, of a list of two or more the best and the worst."""

    def __init__(self, sequences: TokenSequences, groups: np.ndarray, numbers: np.ndarray, *, whole: bool = False):
        """groups: comparison i has the sequences groups[i] to groups[i + 1]. numbers: the comparisons meant. whole:
        see Shape."""
        first, last = groups[:-1][numbers], groups[1:][numbers] - 1
        self._pairs = np.stack([first, last], axis=1)
        lengths = np.asarray(sequences.lengths)
        self.places = lengths[first] + lengths[last] - (0 if whole else 2)
        """Of a row that each takes, [n]."""

    def of(self, stream: SequenceStream) -> "PairStream":
        """The sequences of a stream of comparisons."""
        return PairStream(stream, self._pairs)


class PairStream:
    """A stream of comparisons as their sequences, the chosen one first."""

    def __init__(self, stream: SequenceStream, pairs: np.ndarray):
        self._stream, self._pairs = stream, pairs

    def sample(self, index: int) -> list[int]:
        return [int(number) for pair in self._stream.sample(index) for number in self._pairs[pair]]

    def samples_in(self, epochs: float) -> int:
        return self._stream.samples_in(epochs)


def stream_of(
    stage: SequenceStageConfig, places: np.ndarray, row_tokens: int, *, seed: int, end: float = math.inf,
    shuffle: bool = True,
) -> SequenceStream:  # fmt: skip
    """Samples as the stage batches them: rows of sequences, or single ones. places: that each takes of a row."""
    if stage.batching is Batching.packed:
        return PackedStream(places, row_tokens, seed=seed, end=end, shuffle=shuffle)
    return SingleStream(len(places), seed=seed, end=end, shuffle=shuffle)


def row_unit(cfg: RunConfig, mesh: Mesh) -> int:
    """What the lengths of rows must be divisible by."""
    context = 2 * mesh.sizes.cp if mesh.sizes.cp > 1 else 1
    return math.lcm(context * (mesh.sizes.tp if cfg.parallel.sequence_parallel else 1), ROW_UNIT)


def loader_of(
    cfg: RunConfig, mesh: Mesh, sequences: TokenSequences, stream: SequenceStream, *, row_tokens: int | None = None,
    numbered: bool = False, whole: bool = False,
) -> SequenceLoader:  # fmt: skip
    """This rank's micro-batches. row_tokens: of a packed row, by default model.seq_length; the others: see Shape."""
    stage, sizes = cfg.stage, mesh.sizes
    assert isinstance(stage, SequenceStageConfig)
    shape = Shape(
        batching=stage.batching,
        row_tokens=row_tokens or cfg.model.seq_length,
        micro_batch_size=cfg.train.micro_batch_size,
        budget=stage.max_tokens_per_micro_batch or 0,
        multiple=row_unit(cfg, mesh),
        uniform=sizes.pp > 1,
        rows_multiple=sizes.pp if sizes.vpp is not None else 1,
        numbered=numbered,
        whole=whole,
    )
    return SequenceLoader(
        sequences,
        stream,
        shape,
        data_parallel_rank=mesh.dp_rank,
        data_parallel_size=sizes.dp,
        num_workers=cfg.data.num_workers,
    )
