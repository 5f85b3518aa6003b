"""Rotary position embedding: pairs (i, i + d/2) of a head turned by an angle that grows with the position.

The gradient is the rotation by the opposite angle, so nothing of the input is kept.
"""

import torch
from torch.autograd.function import once_differentiable

from scale_llm.models.ops.wide import wide
from scale_llm.parallel.fused import fused

Tables = tuple[torch.Tensor, torch.Tensor]


def rotary_tables(angles: torch.Tensor, dtype: torch.dtype) -> Tables:
    """Cosine and sine, each [s, 1, 1, rot/2], of angles [s, 1, 1, rot] whose halves are equal.

    dtype: that of the activations; the tables have at least FP32. Made once and shared by the layers.
    """
    half = angles[..., : angles.size(-1) // 2].to(torch.promote_types(dtype, torch.float32))
    return half.cos(), half.sin()


def rotary(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """x [s, b, n, d], the first rot of d turned, the rest passed through -> [s, b, n, d]."""
    return _Rotary.apply(x, *tables)


def split_rotary(
    mixed: torch.Tensor, tables: Tables | None, *, groups: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of Megatron's fused projection, queries and keys turned.

    mixed: [s, b, g * (r + 2) * d], group by group its r query heads, its key and its value. tables: None turns
    nothing. Returns query [s, b, g, r, d], key and value [s, b, g, d], laid out in memory as `attention` reads them,
    [b, g, s, ...].
    """
    cos, sin = tables if tables is not None else (None, None)
    return _SplitRotary.apply(mixed, cos, sin, groups, head_size)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        cos, sin = ctx.saved_tensors
        return _rotate(grad_output, cos, -sin), None, None


class _SplitRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin, groups, head_size):
        ctx.save_for_backward(cos, sin)
        heads = mixed.view(*mixed.shape[:2], groups, -1, head_size)
        query, key, value = _split(heads, cos, sin)
        return query.permute(2, 0, 1, 3, 4), key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key, grad_value):
        cos, sin = ctx.saved_tensors
        return _join(grad_query, grad_key, grad_value, cos, sin).flatten(2), None, None, None, None


@fused
def _split(heads, cos, sin):
    """heads [s, b, g, r + 2, d] -> query [b, g, s, r, d], key and value [b, g, s, d], contiguous."""
    turned, value = heads[..., :-1, :], heads[..., -1, :]
    if cos is not None:
        turned = _turn(turned, cos.unsqueeze(2), sin.unsqueeze(2))
    turned = turned.permute(1, 2, 0, 3, 4)
    return turned[..., :-1, :].contiguous(), turned[..., -1, :].contiguous(), value.permute(1, 2, 0, 3).contiguous()


@fused
def _join(query, key, value, cos, sin):
    """The other way, turned back: gradients [s, b, g, (r,) d] in any layout -> [s, b, g, r + 2, d], contiguous."""
    turned = torch.cat([query, key.unsqueeze(3)], dim=3)
    if cos is not None:
        turned = _turn(turned, cos.unsqueeze(2), -sin.unsqueeze(2))
    return torch.cat([turned, value.unsqueeze(3)], dim=3).contiguous()


@fused
def _rotate(x, cos, sin):
    return _turn(x, cos, sin).contiguous()


def _turn(x, cos, sin):
    half = cos.size(-1)
    x1, x2, rest = wide(x[..., :half]), wide(x[..., half : 2 * half]), x[..., 2 * half :]
    return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest], dim=-1)
