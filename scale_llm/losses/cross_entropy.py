"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks.

megatron-core's own takes no group and reads a global one, so it is wrong for a model whose mesh differs; this one takes
the group. Legend: n tokens, v vocabulary with padding, p ranks of the group.
"""

import torch
import torch.distributed as dist

_CHUNK_ELEMENTS = 1 << 22
"""Logits converted to FP32 at a time: 16 MiB, which stays in the last-level cache."""


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, tp_group: dist.ProcessGroup | None, vocab_size: int
) -> torch.Tensor:
    """-log softmax(logits)[label] of every token, FP32.

    logits: [..., v/p] of any float type, rank r's columns r*v/p to (r+1)*v/p. labels: [...] token ids below vocab_size.
    vocab_size: tokens before padding; the columns above take no part. FP32 accumulation, in chunks of rows, so that no
    FP32 tensor of the logits' size is held. Memory for backward: the logits themselves and two numbers a token.
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
        largest, summed, target = _statistics(flat[:, :valid], column, here)
        if size > 1:
            highest = largest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([summed * (largest - highest).exp(), target])
            dist.all_reduce(sums, group=group)
            largest, (summed, target) = highest, sums
        log_normaliser = largest + summed.log()
        ctx.save_for_backward(logits, log_normaliser, column, here)
        ctx.valid = valid
        return (log_normaliser - target).view(labels.shape)

    @staticmethod
    def backward(ctx, grad_output):
        logits, log_normaliser, column, here = ctx.saved_tensors
        flat, scale = logits.flatten(0, -2), grad_output.flatten().float()
        grad = torch.empty_like(flat)
        grad[:, ctx.valid :] = 0
        for rows in _chunks(flat):
            part = flat[rows, : ctx.valid].to(torch.float32, copy=True)
            part.sub_(log_normaliser[rows, None]).exp_()
            # softmax minus the one-hot target; rows whose target lies on another rank subtract nothing.
            part.scatter_add_(1, column[rows, None], -here[rows, None].float())
            grad[rows, : ctx.valid] = part.mul_(scale[rows, None])
        return grad.view(logits.shape), None, None, None


def _chunks(flat: torch.Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, flat.size(1)))
    return [slice(i, i + rows) for i in range(0, flat.size(0), rows)]


def _statistics(flat, column, here):
    """Largest logit, sum of exp(logit - largest) and target logit of every row of this rank's columns; FP32 [n]."""
    largest = flat.new_full((flat.size(0),), -torch.inf, dtype=torch.float32)
    summed, target = torch.zeros_like(largest), torch.zeros_like(largest)
    if flat.size(1) == 0:
        return largest.fill_(torch.finfo(torch.float32).min), summed, target
    for rows in _chunks(flat):
        part = flat[rows].to(torch.float32, copy=True)
        target[rows] = part.gather(1, column[rows, None]).squeeze(1) * here[rows]
        torch.amax(part, dim=1, out=largest[rows])
        summed[rows] = part.sub_(largest[rows, None]).exp_().sum(dim=1)
    return largest, summed, target
