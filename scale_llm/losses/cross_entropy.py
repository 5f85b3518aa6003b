"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks.

megatron-core's own takes no group and reads a global one, so it is wrong for a model whose mesh differs; this one takes
the group. Legend: n tokens, v vocabulary with padding, p ranks of the group.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from scale_llm.parallel.fused import compiling, fused

_CHUNK_ELEMENTS = 1 << 19
"""Logits converted to FP32 at a time where nothing is compiled: 2 MiB, which stays in a second-level cache."""


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, tp_group: dist.ProcessGroup | None, vocab_size: int
) -> torch.Tensor:
    """-log softmax(logits)[label] of every token, FP32.

    logits: [..., v/p] of any float type, rank r's columns r*v/p to (r+1)*v/p. labels: [...] token ids below vocab_size.
    vocab_size: tokens before padding; the columns above take no part. FP32 arithmetic, and no FP32 tensor of the
    logits' size is held. Memory for backward: the logits themselves.
    """
    return _CrossEntropy.apply(logits, labels, tp_group, vocab_size)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group, vocab_size):
        flat, targets = logits.flatten(0, -2), labels.flatten()
        size = group.size() if group is not None else 1
        start = (group.rank() if group is not None else 0) * flat.size(1)
        valid = max(0, min(flat.size(1), vocab_size - start))  # columns of this rank that are no padding
        here = (targets >= start) & (targets < start + valid)
        column = (targets - start).clamp(0, max(valid - 1, 0))[:, None]
        log_sum = torch.full(targets.shape, -torch.inf, dtype=_wide(flat), device=flat.device)
        if valid:
            for rows in _chunks(flat):
                _log_sum_exp(flat[rows, :valid], log_sum[rows])
        target = flat.gather(1, column).squeeze(1).to(log_sum.dtype) * here
        if size > 1:
            highest = log_sum.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([(log_sum - highest).exp(), target])
            dist.all_reduce(sums, group=group)
            log_sum, target = highest + sums[0].log(), sums[1]
        ctx.save_for_backward(flat, log_sum, here, column)
        ctx.valid = valid
        return (log_sum - target).float().view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """softmax minus the one-hot target, times the token's gradient."""
        flat, log_sum, here, column = ctx.saved_tensors
        scale = grad_output.flatten().to(log_sum.dtype)
        grad = torch.empty_like(flat)
        grad[:, ctx.valid :] = 0
        if ctx.valid:
            for rows in _chunks(flat):
                _softmax(flat[rows, : ctx.valid], log_sum[rows], scale[rows], grad[rows, : ctx.valid])
            # From the logit again, so that probability - 1 is rounded once
            target = (flat.gather(1, column).squeeze(1).to(log_sum.dtype) - log_sum).exp() - here.to(log_sum.dtype)
            rows = torch.arange(flat.size(0), device=flat.device)
            grad[rows, column[:, 0]] = (target * scale).to(grad.dtype)  # scatter_ would copy all of it
        return grad.view(*grad_output.shape, -1), None, None, None


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(flat: torch.Tensor) -> list[slice]:
    rows = flat.size(0) if compiling() else max(1, _CHUNK_ELEMENTS // max(1, flat.size(1)))
    return [slice(i, i + rows) for i in range(0, flat.size(0), rows)]


@fused
def _log_sum_exp(x, out):
    """x [n, v] -> the logarithm of every row's sum of exponentials into out [n]."""
    out.copy_(torch.logsumexp(x.to(out.dtype), dim=1))


@fused
def _softmax(x, log_sum, scale, out):
    """softmax of x [n, v] times scale [n] into out."""
    out.copy_(torch.exp(x.to(scale.dtype) - log_sum[:, None]) * scale[:, None])
