"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks.

megatron-core's own takes no group and reads a global one, so it is wrong for a model whose mesh differs; this one takes
the group. Legend: n tokens, v vocabulary with padding, p ranks of the group.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from scale_llm.losses.vocabulary import Shard, chunks, empty_log_sum, log_sum_exp, softmax, weights_of_ranks, widened
from scale_llm.parallel import collectives
from scale_llm.parallel.fused import fused


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """-log softmax(logits / temperature)[label] of every token, FP32.

    logits: [..., v/p] of any float type, rank r's columns r*v/p to (r+1)*v/p. labels: [...] token ids below vocab_size;
    what other ids give is finite and without meaning. vocab_size: tokens before padding; the columns above take no
    part. FP32 arithmetic, and no FP32 tensor of the logits' size is held. Memory for backward: the logits themselves.
    label_smoothing e: (1 - e) * the above + e * the mean over all vocab_size tokens of -log p (Szegedy et al. 2016,
    section 7), which is what torch and Hugging Face do; Megatron-LM spreads e over the other tokens only.
    """
    assert 0.0 <= label_smoothing < 1.0 and temperature > 0.0
    return _CrossEntropy.apply(logits, labels, tp_group, vocab_size, label_smoothing, temperature)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group, vocab_size, smoothing, temperature):
        flat, targets = logits.flatten(0, -2), labels.flatten()
        shard = Shard.of(flat, group, vocab_size)
        here = (targets >= shard.start) & (targets < shard.start + shard.valid)
        column = (targets - shard.start).clamp(0, max(shard.valid - 1, 0))[:, None]
        log_sum = empty_log_sum(flat)
        for rows in chunks(flat, shard):
            log_sum_exp(flat[rows, : shard.valid], temperature, log_sum[rows])
        wanted = widened(flat.gather(1, column).squeeze(1), log_sum.dtype, temperature) * here
        if smoothing:
            wanted = (1 - smoothing) * wanted + smoothing / vocab_size * _row_sums(flat, shard, temperature, log_sum)
        if shard.ranks > 1:
            weight, highest = weights_of_ranks(log_sum, group)
            sums = torch.stack([weight, wanted])
            collectives.all_reduce(sums, group=group)
            log_sum, wanted = highest + sums[0].log(), sums[1]
        ctx.save_for_backward(flat, log_sum, here, column)
        ctx.shard, ctx.temperature, ctx.smoothing, ctx.uniform = shard, temperature, smoothing, smoothing / vocab_size
        return (log_sum - wanted).float().view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """softmax minus the target distribution, times the token's gradient."""
        flat, log_sum, here, column = ctx.saved_tensors
        shard, temperature, uniform = ctx.shard, ctx.temperature, ctx.uniform
        scale = widened(grad_output.flatten(), log_sum.dtype, temperature)
        grad = torch.empty_like(flat)
        grad[:, shard.valid :] = 0
        for rows in chunks(flat, shard):
            out = grad[rows, : shard.valid]
            softmax(flat[rows, : shard.valid], temperature, log_sum[rows], uniform, scale[rows], out)
        if shard.valid:
            # From the logit again, so that probability - 1 is rounded once
            logit = widened(flat.gather(1, column).squeeze(1), log_sum.dtype, temperature)
            target = (logit - log_sum).exp() - here.to(log_sum.dtype) * (1 - ctx.smoothing) - uniform
            rows = torch.arange(flat.size(0), device=flat.device)
            grad[rows, column[:, 0]] = (target * scale).to(grad.dtype)  # scatter_ would copy all of it
        return grad.view(*grad_output.shape, grad.size(1)), None, None, None, None, None


def _row_sums(flat, shard, temperature, like):
    """[n] sums of this rank's logits, as wide as `like`."""
    sums = torch.zeros_like(like)
    for rows in chunks(flat, shard):
        _sum(flat[rows, : shard.valid], temperature, sums[rows])
    return sums


@fused
def _sum(x, temperature, out):
    """x [n, v] -> every row's sum into out [n]."""
    out.copy_(widened(x, out.dtype, temperature).sum(dim=1))
