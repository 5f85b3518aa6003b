"""Frozen weights in 4 bits (NF4 with quantised scales; QLoRA, arXiv 2305.14314, section 3), by bitsandbytes."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Weights that share a scale."""


class Nf4Weight:
    """A matrix in 4 bits and a little; whole only while it is used."""

    def __init__(self, weight: torch.Tensor):
        from bitsandbytes.functional import quantize_4bit

        self._packed, self._state = quantize_4bit(
            weight.detach().contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )

    def whole(self) -> torch.Tensor:
        """As it was, rounded to 16 levels of its block."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self._packed, self._state)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Its own; the tables of levels are shared by all."""
        yield self._packed
        yield self._state.absmax
        yield self._state.state2.absmax


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, weight.whole(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.matmul(ctx.weight.whole()), None, None


def quantised_linear(
    layer, weight: Nf4Weight, x: torch.Tensor, bias, *, allreduce_dgrad: bool, sequence_parallel: bool
):
    """What megatron-core's `_forward_impl` of a layer computes with a frozen weight."""
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=layer.tp_group)
    elif allreduce_dgrad:
        x = copy_to_tensor_model_parallel_region(x, group=layer.tp_group)
    return _Linear.apply(x, weight, bias)
