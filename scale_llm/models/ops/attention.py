"""Attention with grouped queries, causal with an offset or under an explicit mask.

On a CPU the forward pass is torch's flash kernel and the backward pass is written here, by blocks of queries as batched
matrix products: torch's own CPU backward takes 19 ms where this takes 11 (32 heads of [512, 64], BF16, two cores with
AMX). Nothing of the size of queries x keys is kept between the two. On a GPU both are torch's.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 256
"""Query positions of one block of the backward pass: smaller blocks skip more of the hidden half, larger ones
multiply faster. 256 was the best of 64, 128, 256 and 512 at sequence 512."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    hidden: torch.Tensor | None = None,
    causal: bool = True,
    offset: int | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """softmax(query key^T * scale) value.

    query: [sq, b, g, r, d], or [sq, b, n, d] with n a multiple of g; key, value: [sk, b, g, d].
    hidden: [b or 1, 1, sq, sk], True where a query may not look; it replaces `causal`.
    offset: position of the first query among the keys, by default sk - sq, so that the last query sees every key.
    scale: by default 1 / sqrt(d).
    Returns [sq, b, n * d]. A query that may look nowhere gives 0.
    """
    sq, b = query.shape[:2]
    g, d = key.shape[2:]
    if query.dim() == 4:
        query = query.unflatten(2, (g, query.size(2) // g))
    scale = d**-0.5 if scale is None else scale
    if hidden is not None:
        end = None
    elif causal:
        end = key.size(0) - sq if offset is None else offset
        if end + sq < key.size(0):  # no query sees these keys
            key, value = key[: end + sq], value[: end + sq]
    else:
        end = key.size(0)
    # One "batch" entry for each group: its r heads share the keys, so nothing is repeated.
    q = query.permute(1, 2, 0, 3, 4).flatten(0, 1)  # [b*g, sq, r, d]
    k, v = (x.permute(1, 2, 0, 3).flatten(0, 1) for x in (key, value))  # [b*g, sk, d]
    if q.device.type == "cpu" and dropout_p == 0.0:
        out = _Attention.apply(q, k, v, scale, hidden, end)
    else:
        out = _torch_attention(q, k, v, scale, hidden, end, dropout_p)
    return out.unflatten(0, (b, g)).permute(2, 0, 1, 3, 4).reshape(sq, b, -1)


def _torch_attention(q, k, v, scale, hidden, end, dropout_p=0.0):
    """q [b*g, sq, r, d], k and v [b*g, sk, d] -> [b*g, sq, r, d] by torch's fused kernels.

    end: query i sees keys 0 to end + i; None: `hidden` says it.
    """
    sq, r, sk = q.size(1), q.size(2), k.size(1)
    mask, causal = None, False
    if hidden is not None:
        groups = q.size(0) // hidden.size(0)
        mask = ~hidden.expand(-1, groups, -1, -1).reshape(-1, 1, sq, sk)
    elif end == 0 and sq == sk:
        causal = True
    elif end + 1 < sk:
        mask = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(end)
    k, v = (x.unsqueeze(1).expand(-1, r, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout_p, scale=scale
    )
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, hidden, end):
        ctx.save_for_backward(q, k, v, hidden)
        ctx.scale, ctx.end = scale, end
        return _torch_attention(q, k, v, scale, hidden, end)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        q, k, v, hidden = ctx.saved_tensors
        scale, end, (n, sq, r, d) = ctx.scale, ctx.end, q.shape
        query, grad_out = q.reshape(n, sq * r, d), grad_output.reshape(n, sq * r, d)
        k, v = k.contiguous(), v.contiguous()
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for start in range(0, sq, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, sq)
            seen = k.size(1) if end is None else min(k.size(1), end + stop)
            rows, keys = slice(start * r, stop * r), (slice(None), slice(0, seen))
            dy = grad_out[:, rows]
            mask = _hidden_part(hidden, end, start, stop, seen, q)
            p = _probabilities(query[:, rows], k[keys], scale, mask, blind=end is None or end < 0)
            grad_value[keys] += torch.bmm(p.transpose(1, 2), dy)
            ds = torch.bmm(dy, v[keys].transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
            _scaled_bmm(ds, k[keys], scale, out=grad_query[:, rows])
            grad_key[keys] += torch.bmm(ds.transpose(1, 2), query[:, rows])
        grad_key.mul_(scale)
        return grad_query.view(q.shape), grad_key.to(k.dtype), grad_value.to(v.dtype), None, None, None


def _hidden_part(hidden, end, start, stop, seen, q):
    """(first key the mask covers, mask [b*g or 1, rows * r, keys] True where hidden) of a block of queries, or None."""
    n, r = q.size(0), q.size(2)
    if hidden is not None:
        part = hidden[:, :, start:stop, :seen]
        part = part.expand(-1, n // part.size(0), -1, -1).flatten(0, 1)
        return 0, part.repeat_interleave(r, dim=1)
    if end + start + 1 >= seen:
        return None
    first = max(0, end + start)  # every query of the block sees this key; from here, rows of the scores stay aligned
    part = torch.ones(stop - start, seen - first, dtype=torch.bool).triu(end + start + 1 - first)
    return first, part.repeat_interleave(r, dim=0)


def _probabilities(q, k, scale, hidden, blind):
    """softmax(q k^T * scale) of one block of queries: q [n, rows, d], k [n, keys, d] -> [n, rows, keys].

    blind: some query may see no key at all; its row is 0, as in the forward pass.
    """
    scores = _scaled_bmm(q, k.transpose(1, 2), scale)
    if hidden is not None:
        first, mask = hidden
        # The smaller of a score and its bound: half the time of an addition or a masked fill.
        limits = torch.finfo(q.dtype)
        bound = torch.full(mask.shape, limits.max, dtype=q.dtype).masked_fill_(mask, limits.min)
        torch.minimum(scores[:, :, first:], bound, out=scores[:, :, first:])
    p = torch.ops.aten._softmax.out(scores, -1, False, out=scores)
    if blind:
        p.masked_fill_(mask, 0.0)
    return p


def _scaled_bmm(a, b, scale, out=None):
    """scale * (a @ b), the factor applied inside the product."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale, out=out)
