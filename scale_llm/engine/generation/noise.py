"""Gumbel noise that depends on a sample's seed, the number of its token and the vocabulary id alone.

Adding it to logits and taking the largest draws from their softmax (Gumbel 1954; the "Gumbel-max trick"). Because no
generator's state is read, a text depends neither on what else is in its batch nor on how the vocabulary is cut; and two
passes whose logits differ by rounding draw another token only where two scores are that close.

The noise is a hash, in 32-bit integers that wrap: each id is mixed by itself, then twice with a key of the token.
Legend: n tokens, v ids of this rank.
"""

import numpy as np
import torch

from scale_llm.parallel.fused import fused

_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# Odd multipliers below 2^31 that spread every bit over the word
_FIRST, _SECOND = 0x7FEB352D, 0x2C1B3C6D


def token_keys(seeds: list[int], steps: list[int]) -> torch.Tensor:
    """int32 [n, 2], two words for token `step` of a sample with `seed`. Seeds count modulo 2^64."""
    with np.errstate(over="ignore"):
        seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
        words = _mixed(_mixed(seed + _GOLDEN) + np.array(steps, dtype=np.uint64) * _GOLDEN)
    return torch.from_numpy(words.view(np.int32).reshape(-1, 2))


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def id_words(first: int, count: int, device: torch.device) -> torch.Tensor:
    """int32 [v]: every id of a shard, mixed."""
    with np.errstate(over="ignore"):
        words = _mixed((np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return torch.from_numpy((words >> np.uint64(32)).astype(np.uint32).view(np.int32)).to(device)


@fused(dynamic=True)
def gumbel(ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """ids int32 [v] or [n, v], keys int32 [n, 2] -> FP32 [n, v]."""
    x = (ids ^ keys[:, :1]) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) + keys[:, 1:]
    x = x * _SECOND
    x = x ^ ((x >> 16) & 0xFFFF)
    # 31 bits, never 0 or 1: small numbers, which make large noise, keep all of FP32's precision.
    uniform = (x & 0x7FFFFFFF).float() * (2.0**-31 * (1 - 2.0**-22)) + 2.0**-32
    return -torch.log(-torch.log1p(-uniform))
