"""Which documents belong to training, validation and test. No torch: run before ranks start."""

import math
from collections.abc import Sequence

from scale_llm.data.indexed_check import sequence_lengths

SPLITS = ("train", "validation", "test")


def split_problems(split: str) -> list[str]:
    """What is wrong with a `data.split`."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    shares_fine = all(math.isfinite(share) and share >= 0 for share in shares) and sum(shares) > 0
    if shares_fine and len(shares) <= len(SPLITS):
        return []
    return [
        f"data.split={split}: must be up to three shares, none negative and not all zero; "
        'for example "949,50,1" for training, validation and test'
    ]


def split_ranges(split: str, num_documents: int) -> dict[str, tuple[int, int]]:
    """[begin, end) of each split's documents; adjoining, so disjoint; rounded as megatron-core does."""
    shares = [float(share) for share in split.split(",")]
    shares += [0.0] * (len(SPLITS) - len(shares))
    total = sum(shares)
    ends, end = [0.0], 0.0
    for share in shares:
        end += share / total
        ends.append(end)
    marks = [int(round(end * float(num_documents))) for end in ends]
    return {name: (marks[place], marks[place + 1]) for place, name in enumerate(SPLITS)}


def split_tokens(prefix: str, split: str, name: str) -> int:
    """Tokens that one split of an indexed file holds."""
    lengths = sequence_lengths(prefix)
    begin, end = split_ranges(split, len(lengths))[name]
    return int(lengths[begin:end].sum(dtype="int64"))


def epoch_samples(num_tokens: int, seq_length: int) -> int:
    """Whole samples in one pass over the tokens: each spans seq_length + 1 and shares one with the next."""
    return max(0, (num_tokens - 1) // seq_length)


def splits_too_small(
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    split: str,
    seq_length: int,
    names: Sequence[str] = SPLITS,
) -> list[str]:
    """Problems of the splits that yield no sample, each with what is there, what is wanted and the remedy.

    An unweighted blend takes each source as it is, so one without samples is left out; a weighted one needs
    all.
    """
    problems = split_problems(split)
    for name in () if problems else names:
        tokens = {prefix: split_tokens(prefix, split, name) for prefix in prefixes}
        empty = [prefix for prefix in prefixes if not epoch_samples(tokens[prefix], seq_length)]
        if weights is None and len(empty) < len(prefixes):
            continue
        problems += [_too_small(name, prefix, tokens[prefix], split, seq_length) for prefix in empty]
    return problems


def _too_small(name: str, prefix: str, tokens: int, split: str, seq_length: int) -> str:
    documents = len(sequence_lengths(prefix))
    return (
        f"data.split={split}: the {name} split of {prefix} ({documents} documents) holds {tokens} tokens, "
        f"one sample wants {seq_length + 1} (model.seq_length={seq_length}); give more text, raise "
        f"the share of {name} in data.split, or lower model.seq_length"
    )
