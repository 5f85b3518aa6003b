"""Streams of training samples, split, shuffled and blended by megatron-core's dataset classes.

Sample i of a stream depends on the data, the seed, the sequence length and i alone. Megatron's GPTDataset by
itself does not give that: asked for more samples than an epoch holds, it shuffles all epochs together, so
that a longer run sees another order from its first step. Here each epoch is a GPTDataset of its own, with a
seed of its own; the first has the run's seed, and so the order that Megatron-LM gives a run of one epoch.

Large indices are built by whichever process needs them first; others wait for its file lock, then map the
same files. No process group takes part, so not every rank need call this (pipeline stages in the middle need
no data).

Shapes: s is the sequence length.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy
import torch

from scale_llm.config.data import DataConfig
from scale_llm.config.errors import UserError
from scale_llm.data.batches import Batch, BatchMaker
from scale_llm.data.fim import FillInTheMiddle
from scale_llm.data.megatron import BlendedDataset, GPTDatasetConfig
from scale_llm.data.prepare import PreparedData, check_splits
from scale_llm.data.source_stream import SourceStream, build_mapped
from scale_llm.data.splits import epoch_samples, split_tokens


@dataclasses.dataclass(frozen=True)
class _TokenizerFacts:
    """What megatron-core's configuration asks of a tokenizer; the samples depend on no more."""

    eod: int
    vocab_size: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return dataclasses.asdict(self)


class SampleStream(torch.utils.data.Dataset):
    """Samples of one split, from one source or blended from several; any index below `len` may be asked for.

    A sample: tokens, labels, position_ids int64 [s], loss_mask float32 [s], and with
    `data.reset_attention_mask` attention_mask bool [1, s, s], True where attention is forbidden. Labels are
    the tokens one place on. `rows` and `batch_of` make many at once.
    """

    def __init__(
        self,
        streams: list[SourceStream],
        weights: list[float] | None,
        num_samples: int | None,
        config: GPTDatasetConfig,
        fim: FillInTheMiddle | None = None,
    ):
        self.streams = streams
        self._fim = fim
        self._places = config.sequence_length + 1
        self.batch_of = BatchMaker(
            eod=config.tokenizer.eod,
            reset_position_ids=config.reset_position_ids,
            reset_attention_mask=config.reset_attention_mask,
            eod_mask_loss=config.eod_mask_loss,
        )
        self.samples_per_epoch = sum(stream.samples_per_epoch for stream in streams)
        """Samples in one pass over all sources; a weighted blend repeats the light and skips of the heavy."""
        self.num_samples = self.samples_per_epoch if num_samples is None else num_samples
        self.weighted = weights is not None and len(streams) > 1
        if len(streams) > 1:
            self._which, self._within = self._blend(weights, config)

    def _blend(self, weights: list[float] | None, config: GPTDatasetConfig) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Source [n], and sample within it [n], of n samples: all if weighted, else those of one epoch."""
        shares = weights or [stream.samples_per_epoch for stream in self.streams]
        size = max(self.num_samples, 1) if weights else None

        def make(**changes: Any) -> BlendedDataset:
            return BlendedDataset(self.streams, shares, size, dataclasses.replace(config, **changes))

        blend = build_mapped(
            make,
            ("dataset_index", "dataset_sample_index"),
            size or self.samples_per_epoch,
            config.path_to_cache,
        )
        return blend.dataset_index, blend.dataset_sample_index

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Batch:
        batch = self.batch_of(torch.from_numpy(self.rows(index, 1)))
        return {name: value[0] for name, value in batch.items()}

    def rows(self, start: int, count: int) -> numpy.ndarray:
        """Tokens int64 [count, s + 1] of samples `start` and after; the last of each is the label of the one before."""
        if not 0 <= start <= self.num_samples - count:
            raise IndexError(f"samples {start} to {start + count - 1} of {self.num_samples}")
        out = numpy.empty((count, self._places), dtype=numpy.int64)
        for index, row in enumerate(out, start):
            stream, within = self._find(index)
            stream.read(within, row)
            if self._fim is not None:
                self._fim(row, index)
        return out

    def _find(self, index: int) -> tuple[SourceStream, int]:
        """(the source of a sample, its number within all epochs of that source)."""
        if len(self.streams) == 1:
            return self.streams[0], index
        epoch, place = (0, index) if self.weighted else divmod(index, self.samples_per_epoch)
        stream = self.streams[self._which[place]]
        return stream, epoch * stream.samples_per_epoch + int(self._within[place])


def build_dataset(
    prepared: PreparedData,
    data: DataConfig,
    *,
    split: str,
    seq_length: int,
    seed: int,
    num_samples: int | None = None,
    cache_dir: str | Path,
) -> SampleStream:
    """The stream of one split ("train", "validation" or "test").

    Args:
        num_samples: length of the stream, over as many epochs as it takes; None: one. It changes no sample.
        cache_dir: where large sample indices are kept.

    Raises:
        UserError: when the split yields no sample.
    """
    problems = check_splits(prepared, data, seq_length=seq_length, splits=(split,))
    if problems:
        raise UserError(problems)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(list(prepared.prefixes), prepared.weights),
        split=data.split,
        path_to_cache=str(Path(cache_dir).absolute() / "samples"),
        tokenizer=_TokenizerFacts(prepared.eod, prepared.vocab_size),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.reset_attention_mask,
    )
    # Only an unweighted source may be empty in a split; check_splits refuses a weighted one.
    prefixes = [p for p in prepared.prefixes if epoch_samples(split_tokens(p, data.split, split), seq_length)]
    streams = [SourceStream(prefix, split, config) for prefix in prefixes]
    fim = None
    if split == "train" and data.fim_rate > 0:
        fim = FillInTheMiddle(data, prepared.tokenizer_path, eod=prepared.eod, seed=seed)
    return SampleStream(streams, prepared.weights, num_samples, config, fim)
