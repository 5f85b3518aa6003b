"""What the functions of logits share whose vocabulary is cut over tensor-parallel ranks.

Rank r of p holds columns r*v/p to (r+1)*v/p; the columns from the vocabulary's real size on are padding and take no
part. Arithmetic is FP32 (FP64 for FP64 logits), and no FP32 tensor of the logits' size is held: rows are converted in
chunks, or in registers where compiled. Legend: n tokens, v vocabulary with padding, p ranks of the group.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from scale_llm.parallel import collectives
from scale_llm.parallel.fused import compiling, fused
from scale_llm.parallel.native import call, library

SOURCE = Path(__file__).with_name("softmax.cpp")

CHUNK_ELEMENTS = 1 << 19
"""Logits converted to FP32 at a time where nothing is compiled: 2 MiB, which stays in a second-level cache."""
CHUNK_ELEMENTS_GPU = 1 << 26
"""The same on a GPU, 256 MiB: a kernel of 2 MiB takes less time than its launch."""


class Shard(NamedTuple):
    """This rank's columns: the id of the first, how many of them are no padding, and the ranks of the group."""

    start: int
    valid: int
    ranks: int

    @classmethod
    def of(cls, flat: torch.Tensor, group: dist.ProcessGroup | None, vocab_size: int) -> "Shard":
        """flat: [n, v/p]. vocab_size: tokens before padding."""
        rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
        start = rank * flat.size(1)
        return cls(start, max(0, min(flat.size(1), vocab_size - start)), ranks)


def wide(x: torch.Tensor) -> torch.dtype:
    """What is computed in: FP32, or FP64 for FP64."""
    return torch.promote_types(x.dtype, torch.float32)


def empty_log_sum(flat: torch.Tensor) -> torch.Tensor:
    """[n] logarithms of sums of nothing, which is what a rank with padding only contributes."""
    return torch.full((flat.size(0),), -torch.inf, dtype=wide(flat), device=flat.device)


def chunks(flat: torch.Tensor, shard: Shard) -> list[slice]:
    """Slices of rows; none where all columns are padding."""
    if not shard.valid:
        return []
    elements = CHUNK_ELEMENTS_GPU if flat.is_cuda else CHUNK_ELEMENTS
    rows = max(1, flat.size(0) if compiling() else elements // flat.size(1))
    return [slice(i, i + rows) for i in range(0, flat.size(0), rows)]


def weights_of_ranks(log_sum: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's sum of exponentials [n] over the largest rank's, and that one's logarithm [n]."""
    highest = log_sum.clone()
    collectives.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return (log_sum - highest).exp(), highest


def widened(x: torch.Tensor, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    """x / temperature in `dtype`; no pass of its own at temperature 1."""
    x = x.to(dtype)
    return x if temperature == 1.0 else x / temperature


def log_sum_exp(x: torch.Tensor, temperature: float, out: torch.Tensor) -> None:
    """x [n, v] / temperature -> the logarithm of every row's sum of exponentials into out [n]."""
    kernels = kernels_for(x)
    if kernels is None:
        return _log_sum_exp(x, temperature, out)
    call(kernels.log_sum_exp, x, x.stride(0), out, float(temperature), *x.shape)


def softmax(
    x: torch.Tensor,
    temperature: float,
    log_sum: torch.Tensor,
    uniform: float,
    scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Of x [n, v] / temperature the softmax, by its rows' log_sum [n], less `uniform`, times scale [n], into out."""
    kernels = kernels_for(x)
    if kernels is None:
        return _softmax(x, temperature, log_sum, uniform, scale, out)
    rows = (x, x.stride(0), log_sum, scale.contiguous(), out, out.stride(0))
    call(kernels.softmax, *rows, float(temperature), float(uniform), *x.shape)


def kernels_for(x: torch.Tensor) -> ctypes.CDLL | None:
    """softmax.cpp, where it takes such rows."""
    return library(SOURCE, x) if x.stride(1) == 1 else None


@fused
def _log_sum_exp(x, temperature, out):
    out.copy_(torch.logsumexp(widened(x, out.dtype, temperature), dim=1))


@fused
def _softmax(x, temperature, log_sum, uniform, scale, out):
    probability = torch.exp(widened(x, scale.dtype, temperature) - log_sum[:, None])
    out.copy_((probability - uniform if uniform else probability) * scale[:, None])
