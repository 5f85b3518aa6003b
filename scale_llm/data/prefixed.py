"""Sequences after the same tokens, none of which the loss counts: prompt tuning's virtual ones."""

from dataclasses import dataclass

import numpy as np

from scale_llm.data.sequence_loader import TokenSequence, TokenSequences


@dataclass(frozen=True, slots=True)
class _Prefixed:
    tokens: np.ndarray
    trained: np.ndarray
    weight: float


class PrefixedSequences:
    """See TokenSequences."""

    def __init__(self, sequences: TokenSequences, prefix: np.ndarray):
        self._sequences, self._prefix = sequences, prefix
        self.lengths = np.asarray(sequences.lengths) + len(prefix)

    def __getitem__(self, index: int) -> TokenSequence:
        found = self._sequences[index]
        trained = np.concatenate([np.zeros(len(self._prefix), dtype=bool), found.trained])
        return _Prefixed(np.concatenate([self._prefix, found.tokens]), trained, found.weight)
