"""Rotary position embedding: pairs (i, i + d/2) of a head turned by an angle that grows with the position.

The gradient is the rotation by the opposite angle, so nothing of the input is kept.
"""

import torch
from torch.autograd.function import once_differentiable

Tables = tuple[torch.Tensor, torch.Tensor]


def rotary_tables(angles: torch.Tensor, dtype: torch.dtype) -> Tables:
    """Cosine and sine, each [s, 1, 1, rot/2], of angles [s, 1, 1, rot] whose halves are equal. Once a step, not a layer."""
    half = angles[..., : angles.size(-1) // 2]
    return half.cos().to(dtype), half.sin().to(dtype)


def rotary(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """x [s, b, n, d], the first rot of d turned, the rest passed through -> [s, b, n, d]."""
    return _Rotary.apply(x, *tables)


def split_rotary(
    mixed: torch.Tensor, tables: Tables | None, *, groups: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of Megatron's fused projection, queries and keys turned.

    mixed: [s, b, g * (r + 2) * d], group by group its r query heads, its key and its value. tables: None turns nothing.
    Returns query [s, b, g, r, d], key and value [s, b, g, d], laid out in memory as `attention` reads them, [b, g, s, ...].
    """
    cos, sin = tables if tables is not None else (None, None)
    return _SplitRotary.apply(mixed, cos, sin, groups, head_size)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        cos, sin = ctx.saved_tensors
        return _turn(grad_output, cos, sin, torch.empty_like(grad_output), back=True), None, None


class _SplitRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin, groups, head_size):
        ctx.save_for_backward(cos, sin)
        ctx.groups, ctx.head_size = groups, head_size
        query, key, value = _heads(mixed, groups, head_size)
        s, b, g, r, d = query.shape
        out_query = mixed.new_empty(b, g, s, r, d).permute(2, 0, 1, 3, 4)
        out_key, out_value = mixed.new_empty(2, b, g, s, d).permute(0, 3, 1, 2, 4)
        _turn(query, _wider(cos), _wider(sin), out_query)
        _turn(key, cos, sin, out_key)
        out_value.copy_(value)
        return out_query, out_key, out_value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key, grad_value):
        cos, sin = ctx.saved_tensors
        s, b, g, r, d = grad_query.shape
        grad = grad_query.new_empty(s, b, g * (r + 2) * d)
        query, key, value = _heads(grad, ctx.groups, ctx.head_size)
        _turn(grad_query, _wider(cos), _wider(sin), query, back=True)
        _turn(grad_key, cos, sin, key, back=True)
        value.copy_(grad_value)
        return grad, None, None, None, None


def _heads(mixed, groups, d):
    """Views of queries [s, b, g, r, d], keys and values [s, b, g, d] of the fused projection."""
    by_group = mixed.view(*mixed.shape[:2], groups, -1)
    r = by_group.size(-1) // d - 2
    query = by_group[..., : r * d].unflatten(-1, (r, d))
    return query, by_group[..., r * d : (r + 1) * d], by_group[..., (r + 1) * d :]


def _wider(table):
    return table.unsqueeze(2) if table is not None else None


def _turn(x, cos, sin, out, *, back=False):
    """out = x turned by the angles, or back by them; x and out do not overlap."""
    if cos is None:
        return out.copy_(x)
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    sign = -1 if back else 1
    torch.mul(x1, cos, out=out[..., :half]).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out[..., half : 2 * half]).addcmul_(x1, sin, value=sign)
    if rest.size(-1):
        out[..., 2 * half :].copy_(rest)
    return out
