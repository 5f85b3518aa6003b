"""SwiGLU, silu(gate) * up, over the two halves of one tensor."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from scale_llm.parallel.fused import fused


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2f], gate in the first half and up in the second -> [..., f]."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone: the exponentials are computed again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _forward(x.flatten(0, -2)).view(*x.shape[:-1], x.size(-1) // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return _backward(x.flatten(0, -2), grad_output.flatten(0, -2)).view(x.shape)


@fused
def _forward(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up  # compiled, nothing is rounded before the end


@fused
def _backward(x, grad):
    gate, up = x.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
