"""Root-mean-square norm, y = x / sqrt(mean(x^2) + eps) * weight, with FP32 arithmetic inside. In BF16 on a CPU that
multiplies BF16 by norm.cpp."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from scale_llm.models.ops.wide import wide
from scale_llm.parallel.fused import fused
from scale_llm.parallel.native import call, library

SOURCE = Path(__file__).with_name("norm.cpp")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., h], weight [h] -> [..., h]."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        flat = x.reshape(-1, x.size(-1))
        ctx.library = library(SOURCE, x, weight)
        if ctx.library is None:
            y, inverse = _forward(flat, weight, eps)
        else:
            flat, weight = flat.contiguous(), weight.contiguous()
            y, inverse = torch.empty_like(flat), flat.new_empty(flat.size(0), dtype=torch.float32)
            call(ctx.library.norm_forward, flat, weight, y, inverse, float(eps), *flat.shape)
        ctx.save_for_backward(flat, weight, inverse)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight, inverse = ctx.saved_tensors
        grad = grad_output.reshape(x.shape)
        if ctx.library is None:
            grad_x, grad_weight = _backward(x, weight, inverse, grad)
        else:
            grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
            call(ctx.library.norm_backward, x, weight, inverse, grad.contiguous(), grad_x, grad_weight, *x.shape)
        return grad_x.view(grad_output.shape), grad_weight, None


@fused
def _forward(x, weight, eps):
    """x [n, h] -> y [n, h], 1/rms [n, 1]."""
    inverse = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    return (wide(x) * inverse * wide(weight)).to(x.dtype), inverse


@fused
def _backward(x, weight, inverse, grad):
    """With e = dy * x: dw = sum over rows of e / rms, and dx = dy * w / rms - x * (e . w) / (h * rms^3)."""
    product = wide(grad) * wide(x)
    grad_weight = (product * inverse).sum(0)
    slope = (product * wide(weight)).sum(-1, keepdim=True) * inverse.pow(3) / x.size(-1)
    grad_x = wide(grad) * wide(weight) * inverse - wide(x) * slope
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)
