"""SwiGLU, silu(gate) * up, over the two halves of one tensor."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2f], gate in the first half and up in the second -> [..., f]."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps silu(gate) beside the input: computing the exponentials again would cost more than reading them."""

    @staticmethod
    def forward(ctx, x):
        gate, up = x.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad = torch.empty_like(x)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_output, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
        return grad
