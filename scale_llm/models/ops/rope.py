"""Rotary position embedding: pairs (i, i + d/2) of a head turned by an angle that grows with the position.

The gradient is the rotation by the opposite angle, so nothing of the input is kept.
"""

import torch
from torch.autograd.function import once_differentiable

Tables = tuple[torch.Tensor, torch.Tensor]


def rotary_tables(angles: torch.Tensor, dtype: torch.dtype) -> Tables:
    """Cosine and sine, each [s, 1, 1, rot/2], of angles [s, 1, 1, rot] whose halves are equal.

    Made once a step and shared by the layers.
    """
    half = angles[..., : angles.size(-1) // 2]
    return half.cos().to(dtype), half.sin().to(dtype)


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
        query, key, value = (_contiguous(x) for x in _heads(mixed, groups, head_size))
        if cos is not None:
            query = _turn(query, _wider(cos), _wider(sin), torch.empty_like(query))
            key = _turn(key, cos, sin, torch.empty_like(key))
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key, grad_value):
        cos, sin = ctx.saved_tensors
        s, b, g, r, d = grad_query.shape
        grad = grad_query.new_empty(s, b, g * (r + 2) * d)
        if cos is not None:
            grad_query = _turn(grad_query, _wider(cos), _wider(sin), torch.empty_like(grad_query), back=True)
            grad_key = _turn(grad_key, cos, sin, torch.empty_like(grad_key), back=True)
        for view, part in zip(_heads(grad, ctx.groups, ctx.head_size), (grad_query, grad_key, grad_value), strict=True):
            view.copy_(part)
        return grad, None, None, None, None


def _heads(mixed, groups, d):
    """Views of queries [s, b, g, r, d], keys and values [s, b, g, d] of the fused projection."""
    by_group = mixed.view(*mixed.shape[:2], groups, -1)
    r = by_group.size(-1) // d - 2
    query = by_group[..., : r * d].unflatten(-1, (r, d))
    return query, by_group[..., r * d : (r + 1) * d], by_group[..., (r + 1) * d :]


def _contiguous(x):
    """x [s, b, g, ...] copied to the layout [b, g, s, ...] in memory.

    Copying first and turning then takes half the time of turning from one layout into the other: torch's element-wise
    kernels are slow where the input and output dimensions are ordered differently.
    """
    order = (2, 0, 1, *range(3, x.dim()))
    return x.permute(1, 2, 0, *range(3, x.dim())).contiguous().permute(order)


def _wider(table):
    return table.unsqueeze(2)


def _turn(x, cos, sin, out, *, back=False):
    """out = x turned by the angles, or back by them; x and out do not overlap."""
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    sign = -1 if back else 1
    torch.mul(x1, cos, out=out[..., :half]).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out[..., half : 2 * half]).addcmul_(x1, sin, value=sign)
    if rest.size(-1):
        out[..., 2 * half :].copy_(rest)
    return out
