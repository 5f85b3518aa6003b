"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks.

megatron-core's own takes no group and reads a global one, so it is wrong for a model whose mesh differs; this one takes
the group. Legend: n tokens, v vocabulary with padding, p ranks of the group.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 19
"""Logits converted to FP32 at a time: 2 MiB, which stays in a second-level cache."""

_TINY = 1e-30
"""A probability below this is too close to FP32's smallest number to take its logarithm."""


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, tp_group: dist.ProcessGroup | None, vocab_size: int
) -> torch.Tensor:
    """-log softmax(logits)[label] of every token, FP32.

    logits: [..., v/p] of any float type, rank r's columns r*v/p to (r+1)*v/p. labels: [...] token ids below vocab_size.
    vocab_size: tokens before padding; the columns above take no part. FP32 arithmetic, in chunks of rows, so that no
    FP32 tensor of the logits' size is held. Memory for backward: one tensor like the logits, which becomes their
    gradient in place, so that it runs once.
    """
    return _CrossEntropy.apply(logits, labels, tp_group, vocab_size)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group, vocab_size):
        flat, targets = logits.flatten(0, -2), labels.flatten()
        size = group.size() if group is not None else 1
        start = (group.rank() if group is not None else 0) * flat.size(1)
        valid = max(0, min(flat.size(1), vocab_size - start))
        here = (targets >= start) & (targets < start + valid)
        column = (targets - start).clamp(0, max(valid - 1, 0))
        softmax = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        chosen, target, log_sum = _softmax(flat, valid, column, out=softmax)
        target.mul_(here)
        log_normaliser = log_sum
        if size > 1:
            highest = log_sum.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([(log_sum - highest).exp(), target])
            dist.all_reduce(sums, group=group)
            log_normaliser, target = highest + sums[0].log(), sums[1]
        if softmax is not None:
            share = (log_sum - log_normaliser).exp()  # of the probability that lies on this rank
            ctx.save_for_backward(softmax, share, chosen * share - here.to(chosen.dtype), column)
        return (log_normaliser - target).float().view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """softmax minus the one-hot target, times the token's gradient."""
        softmax, share, at_target, column = ctx.saved_tensors
        scale = grad_output.flatten().to(share.dtype)
        _scale_rows(softmax, share * scale)
        softmax.scatter_(1, column[:, None], (at_target * scale).to(softmax.dtype)[:, None])
        return softmax.view(*grad_output.shape, -1), None, None, None


def _chunks(flat: torch.Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, flat.size(1)))
    return [slice(i, i + rows) for i in range(0, flat.size(0), rows)]


def _softmax(flat, valid, column, out):
    """Softmax over this rank's columns below `valid`, into `out` where given (0 in the columns above).

    flat: [n, v/p]. column: [n], one column of every row. Returns that column's probability and logit and the logarithm
    of the row's sum of exponentials, each [n]. That sum follows from one logit and its probability, so that the row is
    read by one fused kernel and nothing else.
    """
    wide = torch.promote_types(flat.dtype, torch.float32)
    chosen = torch.zeros(flat.size(0), dtype=wide, device=flat.device)
    if out is not None:
        out[:, valid:] = 0
    if valid == 0:
        return chosen, torch.zeros_like(chosen), torch.full_like(chosen, -torch.inf)
    for rows in _chunks(flat):
        part = torch.softmax(flat[rows, :valid], dim=1, dtype=wide)
        torch.gather(part, 1, column[rows, None], out=chosen[rows, None])
        if out is not None:
            out[rows, :valid] = part
    logit = flat.gather(1, column[:, None]).squeeze(1).to(wide)
    log_sum = logit - chosen.log()
    unlikely = (chosen < _TINY).nonzero().squeeze(1)
    if unlikely.numel():
        log_sum[unlikely] = flat[unlikely, :valid].to(wide).logsumexp(1)
    return chosen, logit, log_sum


def _scale_rows(x, factor):
    """x [n, k] *= factor [n, 1], rounded once; nothing to do where every factor is 1, as in a plain sum of losses."""
    if bool((factor == 1).all()):
        return
    for rows in _chunks(x):
        x[rows] = x[rows].to(factor.dtype).mul_(factor[rows, None])
