"""This rank's micro-batches of whole sequences: packed, padded, or by a budget of tokens.

Shapes: b rows, s tokens of a row, n sequences. A batch holds

    tokens, labels, position_ids  int64 [b, s]
    loss_mask                     float32 [b, s], the weight of a label that the loss counts, else 0
    segments                      int64 [b, s], which of `numbers` a place belongs to, -1 for padding, if asked for
    numbers                       int64 [n], the sequences of the micro-batch in the order of their places, likewise
    sequence_weights              float32 [n], of these sequences, likewise
    boundaries                    int32 [n + 1], where each sequence begins and the last one ends, if a row holds
                                  several: then all lie one behind the other in one row, b = 1

A sequence of l tokens takes l - 1 places, for its last token is a label alone. Labels never cross a boundary.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from scale_llm.config.stage import Batching
from scale_llm.data.packing import first_fit_decreasing
from scale_llm.data.sequence_stream import SequenceStream

Batch = dict[str, torch.Tensor]


class TokenSequence(Protocol):
    """tokens: int [l]. trained: bool [l], which of them the loss counts, each `weight` times."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def trained(self) -> np.ndarray: ...
    @property
    def weight(self) -> float: ...


class TokenSequences(Protocol):
    """Sequences by their number. lengths: tokens of each, int [n]."""

    @property
    def lengths(self) -> np.ndarray: ...

    def __getitem__(self, index: int) -> TokenSequence: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How sequences become micro-batches.

    row_tokens: places of a packed row, and the most that one sequence takes. micro_batch_size: rows (packed) or
    sequences (padded) of a micro-batch. budget: places of a micro-batch (token_budget). multiple: row lengths are
    multiples of it. uniform: all micro-batches of a step have one shape, as pipeline stages need it. rows_multiple: of
    a rank's micro-batches (token_budget), as interleaved schedules need it. numbered: batches say which sequence is
    where. whole: for models that judge a sequence: its last token has a place too, and the mask is 1 at the last token
    that counts alone; with every_token at all that count.
    """

    batching: Batching
    row_tokens: int
    micro_batch_size: int = 1
    budget: int = 0
    multiple: int = 1
    uniform: bool = False
    rows_multiple: int = 1
    numbered: bool = False
    whole: bool = False
    every_token: bool = False


class SequenceLoader:
    """Micro-batches of one data-parallel rank, from any position in the stream."""

    def __init__(
        self, sequences: TokenSequences, stream: SequenceStream, shape: Shape, *, data_parallel_rank: int,
        data_parallel_size: int, num_workers: int = 0,
    ):  # fmt: skip
        self._sequences, self._stream, self._shape = sequences, stream, shape
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader") if num_workers else None
        self._next: tuple[tuple[int, int], Future[list[Batch]]] | None = None

    def global_batch(self, consumed_samples: int, global_batch_size: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins at sample `consumed_samples`."""
        if self._pool is None:
            return self._make(consumed_samples, global_batch_size)
        wanted = (consumed_samples, global_batch_size)
        made = self._next[1] if self._next is not None and self._next[0] == wanted else None
        following = (consumed_samples + global_batch_size, global_batch_size)
        # Never on this thread: streams find out where epochs begin as they go, which two at once would get wrong
        batches = (made or self._pool.submit(self._make, *wanted)).result()
        self._next = (following, self._pool.submit(self._make, *following))
        return batches

    def tokens_in(self, consumed_samples: int, global_batch_size: int) -> int:
        """Tokens of a global batch over all ranks, padding apart."""
        indices = range(consumed_samples, consumed_samples + global_batch_size)
        return sum(self._places(self._stream.sample(index)) for index in indices)

    def close(self) -> None:
        """Stops the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _make(self, start: int, size: int) -> list[Batch]:
        if self._shape.batching is Batching.token_budget:
            return self._by_budget([self._stream.sample(index) for index in range(start, start + size)])
        each, stride = self._shape.micro_batch_size, self._shape.micro_batch_size * self._ranks
        assert size % stride == 0, f"{size} is no multiple of {stride}"
        firsts = range(start + self._rank * each, start + size, stride)
        samples = [[self._stream.sample(index) for index in range(first, first + each)] for first in firsts]
        packed = self._shape.batching is Batching.packed
        return [self._joined(rows) for rows in samples] if packed else self._padded(samples)

    def _joined(self, rows: list[list[int]]) -> Batch:
        """Packed rows, each of full length, one behind the other."""
        return self._batch(rows, self._shape.row_tokens, joined=True)

    def _padded(self, samples: list[list[list[int]]]) -> list[Batch]:
        """Single sequences as rows as long as the longest of their micro-batch."""
        single = [[[number] for sample in rows for number in sample] or [[]] for rows in samples]
        most = max(len(rows) for rows in single) if self._shape.uniform else 0
        single = [rows + [[]] * (most - len(rows)) for rows in single]
        widths = self._widths([max(self._places(row) for row in rows) for rows in single])
        return [self._batch(rows, width, joined=False) for rows, width in zip(single, widths, strict=True)]

    def _by_budget(self, samples: list[list[int]]) -> list[Batch]:
        """The whole global batch into rows of at most the budget, dealt out to ranks, the fullest first."""
        whole = [sample for sample in samples if sample]
        packed = first_fit_decreasing([self._places(sample) for sample in whole], self._shape.budget)
        rows = [[number for place in row for number in whole[place]] for row in packed]
        rows.sort(key=lambda row: -self._places(row))
        unit = self._ranks * self._shape.rows_multiple
        rows += [[]] * (-len(rows) % unit or (unit if not rows else 0))
        mine = rows[self._rank :: self._ranks]
        widths = self._widths([self._places(row) for row in mine])
        return [self._batch([row], width, joined=True) for row, width in zip(mine, widths, strict=True)]

    def _places(self, numbers: Sequence[int]) -> int:
        short = 0 if self._shape.whole else 1
        return int(sum(self._sequences.lengths[number] - short for number in numbers))

    def _widths(self, places: list[int]) -> list[int]:
        if self._shape.uniform:
            places = [max(places)] * len(places)
        unit = self._shape.multiple
        return [max(-(-count // unit), 1) * unit for count in places]

    def _batch(self, rows: list[list[int]], width: int, *, joined: bool) -> Batch:
        filled = [self._row(numbers, width) for numbers in rows]
        batch = _stack(filled, joined=joined)
        if self._shape.numbered:
            batch["segments"] = _segments(filled).view(batch["tokens"].shape)
            batch["numbers"] = torch.tensor([number for row in rows for number in row], dtype=torch.int64)
            weights = [weight for row in filled for weight in row.weights]
            batch["sequence_weights"] = torch.tensor(weights, dtype=torch.float32)
        return batch

    def _row(self, numbers: Sequence[int], width: int) -> "_Row":
        row = _Row.empty(width)
        for number in numbers:
            if self._shape.whole:
                row.add_whole(self._sequences[number], every_token=self._shape.every_token)
            else:
                row.add(self._sequences[number])
        return row


@dataclass(slots=True)
class _Row:
    """Sequences one behind the other, then padding; `ends` and `weights` are those of the sequences."""

    tokens: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray
    ends: list[int]
    weights: list[float]

    @classmethod
    def empty(cls, width: int) -> "_Row":
        tokens, labels, position_ids = (np.zeros(width, dtype=np.int64) for _ in range(3))
        return cls(tokens, labels, position_ids, np.zeros(width, dtype=np.float32), [], [])

    def add_whole(self, sequence: TokenSequence, *, every_token: bool) -> None:
        start = self.ends[-1] if self.ends else 0
        end = start + len(sequence.tokens)
        self.tokens[start:end], self.position_ids[start:end] = sequence.tokens, np.arange(end - start)
        counted = np.flatnonzero(sequence.trained)
        self.loss_mask[start + (counted if every_token else counted[-1:])] = 1
        self._end(end, sequence)

    def add(self, sequence: TokenSequence) -> None:
        start = self.ends[-1] if self.ends else 0
        end = start + len(sequence.tokens) - 1
        self.tokens[start:end] = sequence.tokens[:-1]
        self.labels[start:end] = sequence.tokens[1:]
        self.position_ids[start:end] = np.arange(end - start)
        self.loss_mask[start:end] = sequence.trained[1:] * np.float32(sequence.weight)
        self._end(end, sequence)

    def _end(self, end: int, sequence: TokenSequence) -> None:
        self.ends.append(end)
        self.weights.append(sequence.weight)


def _stack(rows: list[_Row], *, joined: bool) -> Batch:
    """Rows above each other [b, s], or one behind the other [1, b * s] with their boundaries.

    The padding between joined rows is a sequence of its own.
    """
    names = ("tokens", "labels", "position_ids", "loss_mask")
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    if not joined:
        return {name: torch.from_numpy(np.stack(parts)) for name, parts in columns.items()}
    batch = {name: torch.from_numpy(np.concatenate(parts)[None]) for name, parts in columns.items()}
    width, boundaries = len(rows[0].tokens), [0]
    for number, row in enumerate(rows):
        boundaries += [number * width + end for end in row.ends]
        if number + 1 < len(rows) and boundaries[-1] < (number + 1) * width:
            boundaries.append((number + 1) * width)
    return {**batch, "boundaries": torch.tensor(boundaries, dtype=torch.int32)}


def _segments(rows: list[_Row]) -> torch.Tensor:
    """[b, s], the number of the sequence that each place belongs to within the batch."""
    found, first = torch.full((len(rows), len(rows[0].tokens)), -1), 0
    for segments, row in zip(found, rows, strict=True):
        for number, (start, end) in enumerate(zip([0, *row.ends], row.ends, strict=False)):
            segments[start:end] = first + number
        first += len(row.ends)
    return found
