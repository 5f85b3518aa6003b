"""Rotary position embedding: pairs (i, i + d/2) of a head turned by an angle that grows with the position.

The gradient is the rotation by the opposite angle, so nothing of the input is kept.
"""

import torch
from torch.autograd.function import once_differentiable

from scale_llm.models.ops.wide import wide
from scale_llm.parallel.fused import fused

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of each position [s, 1, 1, 1, rot/2]: both halves of a head turn by the same angles."""


def rotary_tables(angles: torch.Tensor, dtype: torch.dtype) -> Tables:
    """Tables of angles [s, 1, 1, rot] whose halves are equal.

    dtype: that of the activations; the tables have at least FP32. Made once and shared by the layers.
    """
    half = angles[..., : angles.size(-1) // 2].to(torch.promote_types(dtype, torch.float32)).unsqueeze(-2)
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
        return _rotate(x, cos, sin).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        cos, sin = ctx.saved_tensors
        return _rotate(grad_output, cos, -sin).view(grad_output.shape), None, None


class _SplitRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin, groups, head_size):
        ctx.save_for_backward(cos, sin)
        heads = mixed.view(*mixed.shape[:2], groups, -1, head_size)
        (s, b), r = heads.shape[:2], heads.size(3) - 2
        query, key, value = _split(heads, cos, sin)
        key, value = (x.view(b, groups, s, head_size).permute(2, 0, 1, 3) for x in (key, value))
        return query.view(b, groups, s, r, head_size).permute(2, 0, 1, 3, 4), key, value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key, grad_value):
        cos, sin = ctx.saved_tensors
        return _join(grad_query, grad_key, grad_value, cos, sin).flatten(2), None, None, None, None


@fused
def _split(heads, cos, sin):
    """heads [s, b, g, r + 2, d] -> query [b, g, s, r, p, d/p], key and value [b, g, s, p, d/p], contiguous, p as in
    `_turn`. Laid out before they are turned: what is computed is then written once."""
    heads = heads.permute(1, 2, 0, 3, 4)
    query, key, value = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
    if cos is None:
        return query.contiguous(), key.contiguous(), value.contiguous()
    query, key = _turn(query, cos[:, 0], sin[:, 0]), _turn(key, cos[:, 0, 0], sin[:, 0, 0])
    return query.contiguous(), key.contiguous(), value.contiguous()


@fused
def _join(query, key, value, cos, sin):
    """The other way, turned back: gradients [s, b, g, (r,) d] in any layout -> [s, b, g, r + 2, p, d/p], contiguous."""
    key, value = key.unsqueeze(3), value.unsqueeze(3)
    if cos is not None:
        query, key = (_turn(x, cos.unsqueeze(1), -sin.unsqueeze(1)) for x in (query, key))
        value = value.unflatten(-1, query.shape[-2:])
    return torch.cat([query, key, value], dim=3).contiguous()


@fused
def _rotate(x, cos, sin):
    return _turn(x, cos, sin).contiguous()


def _turn(x, cos, sin):
    """x [..., d] -> [..., p, d/p]: p is 2 where all of a head turns, else 1. To flatten the halves is the caller's: in
    one compiled loop over both, each number would be found by a division."""
    pair = wide(x[..., : 2 * cos.size(-1)]).unflatten(-1, (2, cos.size(-1)))
    sign = torch.arange(-1, 3, 2, dtype=sin.dtype, device=sin.device).unsqueeze(-1)
    turned = (pair * cos + pair.flip(-2) * (sign * sin)).to(x.dtype)
    if turned.size(-2) * turned.size(-1) == x.size(-1):
        return turned
    return torch.cat([turned.flatten(-2), x[..., 2 * cos.size(-1) :]], dim=-1).unsqueeze(-2)
