"""Answers beside the prompts of others: what KTO's reference point is measured on."""

from dataclasses import dataclass

import numpy as np

from scale_llm.data.sequence_loader import TokenSequence, TokenSequences
from scale_llm.data.sequence_stream import shuffled

SEED = 20260102
"""Of who gets whose answer: not the run's, so that what is known of these sequences is known for every seed."""


@dataclass(frozen=True, slots=True)
class _Mismatched:
    tokens: np.ndarray
    trained: np.ndarray
    weight: float = 1.0


class WithMismatched:
    """Sequences 0 to n - 1, and as n + i the prompt of i with the answer of another one; see TokenSequences.

    Answers of weight 0 are given to nobody whose own is not.
    """

    def __init__(self, sequences: TokenSequences, longest: int):
        """longest: tokens of a sequence, beyond which an answer is cut."""
        own = np.asarray(sequences.lengths)
        self._sequences, self._longest, self._count = sequences, longest, len(own)
        order = shuffled(len(own), SEED, 0)
        self._partner = np.empty_like(order)
        starts, counts = np.zeros(len(own), dtype=np.int64), np.zeros(len(own), dtype=bool)
        for number in range(len(own)):
            sequence = sequences[number]
            starts[number], counts[number] = _start(sequence), sequence.weight > 0
        for circle in (order[counts[order]], order[~counts[order]]):
            self._partner[circle] = np.roll(circle, -1)  # one cycle, so nobody keeps its own
        answers = own - starts
        self.lengths = np.concatenate([own, np.minimum(starts + answers[self._partner], longest)])

    def mismatched(self, number: int) -> int:
        """The number of a sequence's prompt with another answer."""
        return self._count + number

    def __getitem__(self, index: int) -> TokenSequence:
        if index < self._count:
            return self._sequences[index]
        own, other = self._sequences[index - self._count], self._sequences[int(self._partner[index - self._count])]
        mine, theirs = _start(own), _start(other)
        tokens = np.concatenate([own.tokens[:mine], other.tokens[theirs:]])[: self._longest]
        trained = np.concatenate([own.trained[:mine], other.trained[theirs:]])[: self._longest]
        return _Mismatched(tokens, trained)


def _start(sequence: TokenSequence) -> int:
    """Where the answer begins."""
    return int(np.argmax(sequence.trained))
