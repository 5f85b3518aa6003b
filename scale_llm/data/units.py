"""What a stage draws as one: a conversation, a single answer, or the answers of one comparison.

Sequences have numbers from 0; those of a unit lie one behind the other, unit i from groups[i] to groups[i + 1].
"""

import numpy as np

from scale_llm.data.sequence_stream import SequenceStream


class Units:
    """Some of the units of a data set, renumbered from 0."""

    def __init__(
        self, lengths: np.ndarray, groups: np.ndarray, numbers: np.ndarray, *, whole: bool = False, ends: bool = False
    ):
        """lengths: tokens of every sequence, int [n]. groups: int [u + 1]. numbers: the units meant. whole: see
        sequence_loader.Shape. ends: of each unit the first sequence and the last alone, the best and the worst of a
        ranking."""
        self._first, self._last, self._ends = groups[:-1][numbers], groups[1:][numbers], ends
        taken = np.asarray(lengths) - (0 if whole else 1)
        if ends:
            self.places = taken[self._first] + taken[self._last - 1]
        else:
            before = np.concatenate([[0], np.cumsum(taken)])
            self.places = before[self._last] - before[self._first]
        """Of a row that each takes, int [u]."""

    def __len__(self) -> int:
        return len(self._first)

    def members(self, unit: int) -> list[int]:
        """The sequences of a unit."""
        first, end = int(self._first[unit]), int(self._last[unit])
        return [first, end - 1] if self._ends else list(range(first, end))


def single_units(count: int) -> np.ndarray:
    """The groups of sequences that are drawn one by one."""
    return np.arange(count + 1)


class UnitStream:
    """A stream of units as the sequences they have."""

    def __init__(self, stream: SequenceStream, units: Units):
        self._stream, self._units = stream, units

    def sample(self, index: int) -> list[int]:
        return [number for unit in self._stream.sample(index) for number in self._units.members(unit)]

    def samples_in(self, epochs: float) -> int:
        return self._stream.samples_in(epochs)
