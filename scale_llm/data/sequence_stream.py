"""Which sequences make sample i of a run: single ones in a shuffled order, or rows of several.

Both depend on the lengths, the seed and the epoch alone, so the position in the data is one number, consumed samples.
Every epoch holds each sequence once. The stream ends after a number of epochs, and samples after its end are empty: the
last global batch is smaller, not left out.
"""

import bisect
import math
from functools import lru_cache
from typing import Protocol

import numpy as np

from scale_llm.config.stage import Batching, SequenceStageConfig
from scale_llm.data.packing import first_fit_decreasing

WINDOW = 65_536
"""Sequences that are packed together: rows are filled as well by so many as by all, and an epoch stays shuffled."""


ROW_UNIT = 8
"""Rows of no fixed length are multiples of this, so that fewer shapes are seen."""


class SequenceStream(Protocol):
    """Samples by their index in the run."""

    def sample(self, index: int) -> list[int]:
        """The sequences of one sample; none after the end."""

    def samples_in(self, epochs: float) -> int:
        """Samples of the first so many epochs."""


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """An order of 0..count-1 for one epoch; counter-based, so any epoch is found at once."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


class SingleStream:
    """A sample is one sequence."""

    def __init__(self, count: int, *, seed: int, end: float = math.inf, shuffle: bool = True):
        """count: sequences in an epoch; end: epochs."""
        self._count, self._shuffle = count, shuffle
        self._end = math.inf if end == math.inf else self.samples_in(end)
        self._order = lru_cache(maxsize=2)(lambda epoch: shuffled(count, seed, epoch))

    def samples_in(self, epochs: float) -> int:
        return math.ceil(epochs * self._count)

    def sample(self, index: int) -> list[int]:
        if index >= self._end:
            return []
        epoch, place = divmod(index, self._count)
        return [int(self._order(epoch)[place]) if self._shuffle else place]


class PackedStream:
    """A sample is a row of whole sequences, filled by first-fit decreasing; the rows of an epoch are shuffled."""

    def __init__(self, lengths: np.ndarray, capacity: int, *, seed: int, end: float = math.inf, shuffle: bool = True):
        """lengths: tokens of every sequence; capacity: of a row; end: epochs."""
        self._lengths, self._capacity, self._seed, self._shuffle = np.asarray(lengths), capacity, seed, shuffle
        self._rows = lru_cache(maxsize=2)(self._pack)
        self._starts = [0]  # sample at which each epoch begins, as far as known
        self._end = math.inf if end == math.inf else self.samples_in(end)

    def samples_in(self, epochs: float) -> int:
        whole = math.floor(epochs)
        self._know(whole)
        part = math.ceil((epochs - whole) * len(self._rows(whole))) if epochs > whole else 0
        return self._starts[whole] + part

    def sample(self, index: int) -> list[int]:
        if index >= self._end:
            return []
        while self._starts[-1] <= index:
            self._know(len(self._starts))
        epoch = bisect.bisect_right(self._starts, index) - 1
        return self._rows(epoch)[index - self._starts[epoch]]

    def efficiency(self) -> float:
        """Share of the first epoch's places that hold a token."""
        return float(self._lengths.sum()) / (len(self._rows(0)) * self._capacity)

    def _know(self, epoch: int) -> None:
        """Finds out where `epoch` begins."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._rows(len(self._starts) - 1)))

    def _pack(self, epoch: int) -> list[list[int]]:
        count = len(self._lengths)
        order = shuffled(count, self._seed, epoch) if self._shuffle else np.arange(count)
        rows: list[list[int]] = []
        for start in range(0, count, WINDOW):
            part = order[start : start + WINDOW]
            packed = first_fit_decreasing(self._lengths[part], self._capacity)
            rows += [[int(part[place]) for place in row] for row in packed]
        if not self._shuffle:
            return rows
        # Another key than the order's: first-fit decreasing leaves the fullest rows first
        return [rows[place] for place in shuffled(len(rows), self._seed + (1 << 32), epoch)]


def filled(
    stage: SequenceStageConfig, lengths: np.ndarray, *, row_tokens: int, micro_batch_size: int, seed: int
) -> float:
    """Share of the places of the first epoch that hold a token; lengths: places that each sequence takes."""
    if stage.batching is Batching.packed:
        return PackedStream(lengths, row_tokens, seed=seed).efficiency()
    if stage.batching is Batching.token_budget:
        return float(lengths.sum() / (-(-lengths // ROW_UNIT) * ROW_UNIT).sum())
    order = shuffled(len(lengths), seed, 0)
    batches = [lengths[order[i : i + micro_batch_size]] for i in range(0, len(lengths), micro_batch_size)]
    places = sum(-(-int(batch.max()) // ROW_UNIT) * ROW_UNIT * micro_batch_size for batch in batches)
    return float(lengths.sum()) / places
