"""SwiGLU, silu(gate) * up, over the two halves of one tensor. In BF16 on a CPU that multiplies BF16 by swiglu.cpp."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from scale_llm.parallel.fused import fused
from scale_llm.parallel.native import call, library

SOURCE = Path(__file__).with_name("swiglu.cpp")


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2f], gate in the first half and up in the second -> [..., f]."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone: the exponentials are computed again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.library = library(SOURCE, x)
        rows, f = x.flatten(0, -2), x.size(-1) // 2
        if ctx.library is None:
            return _forward(rows).view(*x.shape[:-1], f)
        out = x.new_empty(*x.shape[:-1], f)
        call(ctx.library.swiglu_forward, *_strided(rows), out, rows.size(0), f)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grad_output.flatten(0, -2)
        if ctx.library is None:
            return _backward(rows, grad).view(x.shape)
        out = torch.empty(x.shape, dtype=x.dtype)
        call(ctx.library.swiglu_backward, *_strided(rows), *_strided(grad), out, *grad.shape)
        return out


def _strided(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows whose numbers lie side by side, and how far one is from the next."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


@fused
def _forward(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up  # compiled, nothing is rounded before the end


@fused
def _backward(x, grad):
    gate, up = x.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
