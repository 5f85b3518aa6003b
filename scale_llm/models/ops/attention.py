"""Attention with grouped queries, causal with an offset or under an explicit mask.

Causal attention in BF16 on a CPU that multiplies BF16 is `attention_native`. Elsewhere on a CPU, and under a mask, the
forward pass is torch's flash kernel and the backward pass is written here, by blocks of queries as batched matrix
products: torch's own takes 19 ms where this takes 9 (32 heads of [512, 64], BF16, two cores with AMX). Nothing of the
size of queries x keys is kept between the two. On a GPU both are torch's.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from scale_llm.models.ops import attention_native
from scale_llm.models.ops.wide import wide
from scale_llm.parallel.fused import add_into, compiling, fused

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
    window: int | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """softmax(query key^T * scale) value.

    query: [sq, b, g, r, d], or [sq, b, n, d] with n a multiple of g; key, value: [sk, b, g, d].
    hidden: [b or 1, 1, sq, sk], True where a query may not look; it replaces `causal`.
    offset: position of the first query among the keys, by default sk - sq, so that the last query sees every key.
    window: keys that a query sees at most, the last of those above; None: all. scale: by default 1 / sqrt(d).
    Returns [sq, b, n * d]. A query that may look nowhere gives 0.
    """
    sq = query.size(0)
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
    if window is not None and window < key.size(0):
        hidden, end = _outside(window, hidden, end, sq, key.size(0), query.device), None
    q, k, v = query.permute(1, 2, 0, 3, 4), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
    if q.device.type == "cpu" and dropout_p == 0.0:
        if hidden is None and attention_native.takes_heads(q.dtype, q.device, q.size(-1)):
            return attention_native.Attention.apply(q, k, v, scale, end, None)
        return _Attention.apply(q, k, v, scale, hidden, end)
    heads, k, v, mask, is_causal = _for_kernel(q, k, v, hidden, end)
    out = F.scaled_dot_product_attention(
        heads, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p, scale=scale
    )
    return _merge(out.unflatten(0, q.shape[:2]))


def attention_of_sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Causal attention of the sequences of one row, each to itself alone.

    Shapes as in `attention`, with sq = sk and b = 1. starts: int32 [n + 1], where each begins, and the end of the last;
    places behind it give 0. Only where `takes_heads`.
    """
    g = key.size(2)
    if query.dim() == 4:
        query = query.unflatten(2, (g, query.size(2) // g))
    q, k, v = query.permute(1, 2, 0, 3, 4), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
    return attention_native.Attention.apply(q, k, v, scale, 0, starts)


def _outside(window, hidden, end, sq, sk, device):
    """The mask with keys hidden that lie `window` or more before a query's last; [b or 1, 1, sq, sk]."""
    first = sk - sq if end is None else end
    all_keys = torch.ones(sq, sk, dtype=torch.bool, device=device)
    beyond = all_keys.tril(first - window)
    return beyond | (all_keys.triu(first + 1)[None, None] if hidden is None else hidden)


def _for_kernel(q, k, v, hidden, end):
    """Queries [b, g, sq, r, d], keys and values [b, g, sk, d] as torch's kernels want them, without a copy.

    One "batch" entry for each group, whose r heads share its keys: queries [b*g, r, sq, d], keys and values
    [b*g, r, sk, d], mask [b*g or 1, 1, sq, sk] True where a query looks, or None, and whether it is the kernels' own
    causal one. end: query i sees keys 0 to end + i; None: `hidden` says it.
    """
    b, g, sq, r, _ = q.shape
    sk = k.size(2)
    mask, causal = None, False
    if hidden is not None:
        mask = ~hidden
        if mask.size(0) > 1:
            mask = mask.expand(-1, g, -1, -1).reshape(b * g, 1, sq, sk)
    elif end == 0 and sq == sk:
        causal = True
    elif end + 1 < sk:
        mask = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(end)
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, r, -1, -1) for x in (k, v))
    return q.flatten(0, 1).transpose(1, 2), k, v, mask, causal


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, hidden, end):
        heads, keys, values, mask, is_causal = _for_kernel(q, k, v, hidden, end)
        if mask is not None:  # the kernel itself takes what is added to the scores
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            heads, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        out = _merge(out.unflatten(0, q.shape[:2]))
        log_sum = log_sum.unflatten(0, q.shape[:2]).transpose(2, 3)  # [b, g, sq, r]
        ctx.save_for_backward(q, k, v, hidden, out, log_sum)
        ctx.scale, ctx.end = scale, end
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        q, k, v, hidden, out, log_sum = ctx.saved_tensors
        b, g, sq, r, d = q.shape
        scale, end, n = ctx.scale, ctx.end, b * g
        dy, delta = _split_gradient(*(x.view(sq, b, g, r, d) for x in (grad_output.contiguous(), out)))
        dy, query = dy.view(n, sq * r, d), q.reshape(n, sq * r, d)
        keys, values = k.reshape(n, -1, d), v.reshape(n, -1, d)
        grad_query = torch.empty_like(query)
        grad_key: torch.Tensor | None = None
        grad_value: torch.Tensor | None = None
        for start in reversed(range(0, sq, BLOCK_ROWS)):  # the last block's queries see all keys
            stop = min(start + BLOCK_ROWS, sq)
            seen = keys.size(1) if end is None else min(keys.size(1), end + stop)
            rows, some = slice(start * r, stop * r), (slice(None), slice(0, seen))
            p = torch.bmm(query[:, rows], keys[some].transpose(1, 2))
            ds = torch.bmm(dy[:, rows], values[some].transpose(1, 2))
            block = [x.view(b, g, stop - start, r, seen) for x in (p, ds)]
            block += [x[:, :, start:stop] for x in (log_sum, delta)]
            if hidden is None:
                last = torch.arange(end + start, end + stop, dtype=torch.int32)
                _in_parts(lambda *part, last=last: _causal_gradient(*part, scale, last), *block)
            else:
                mask = hidden[:, :, start:stop, None].expand(b, -1, -1, -1, -1)
                _in_parts(lambda *part: _masked_gradient(*part[:4], scale, part[4]), *block, mask)
            torch.bmm(ds, keys[some], out=grad_query[:, rows])
            grad_value = _added(grad_value, torch.bmm(p.transpose(1, 2), dy[:, rows]))
            grad_key = _added(grad_key, torch.bmm(ds.transpose(1, 2), query[:, rows]))
        assert grad_key is not None and grad_value is not None
        grads = (x.to(q.dtype).view(like.shape) for x, like in ((grad_query, q), (grad_key, k), (grad_value, v)))
        return *grads, None, None, None


def _added(total, part):
    """The sum over blocks of the gradients [n, seen, d] of the keys that they see: one block's as it is, else FP32."""
    if total is None:
        return part
    total = wide(total)
    add_into(total[:, : part.size(1)], part)
    return total


def _in_parts(function, *tensors):
    """One call if compiled, else one for each entry of the batch, so that what is between stays in cache."""
    for part in [tensors] if compiling() else zip(*(x.split(1) for x in tensors), strict=True):
        function(*part)


@fused
def _merge(out):
    """[b, g, r, sq, d] -> [sq, b, g * r * d]."""
    return out.permute(3, 0, 1, 2, 4).flatten(2).contiguous()


@fused
def _split_gradient(grad, out):
    """Gradient and output [sq, b, g, r, d] -> the gradient [b, g, sq, r, d] and its product with the output, summed
    over d, [b, g, sq, r]."""
    grad, out = (x.permute(1, 2, 0, 3, 4) for x in (grad, out))
    return grad.contiguous(), (wide(grad) * wide(out)).sum(-1)


@fused(dynamic=True)
def _causal_gradient(scores, grad, log_sum, delta, scale, last):
    """Scores -> probabilities and the gradient of the probabilities -> that of the products of queries and keys.

    Both [b, g, rows, r, keys], in place. log_sum: of the row's exponentials; delta: the row's sum of p * gradient, both
    [b, g, rows, r]. last: [rows], the last key that a row sees.
    """
    hidden = torch.arange(scores.size(-1), dtype=torch.int32) > last[:, None, None]
    _gradient(scores, grad, log_sum, delta, scale, hidden)


@fused(dynamic=True)
def _masked_gradient(scores, grad, log_sum, delta, scale, hidden):
    """The same under a mask [b, 1, rows, 1, keys], True where hidden."""
    _gradient(scores, grad, log_sum, delta, scale, hidden)


def _gradient(scores, grad, log_sum, delta, scale, hidden):
    p = torch.where(hidden, 0.0, torch.exp(wide(scores) * scale - log_sum.unsqueeze(-1)))
    # Hidden again: with the same indices as the probabilities it is compiled into one pass with them, else they are
    # kept in FP32 between two.
    grad.copy_(torch.where(hidden, 0.0, p * (wide(grad) - delta.unsqueeze(-1)) * scale))
    scores.copy_(p)
