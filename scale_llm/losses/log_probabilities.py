"""Log-probabilities, entropy and accuracy over a vocabulary that is cut over tensor-parallel ranks.

Logits at position t-1 belong to token t: the caller passes the shifted tokens. Divide by the sampling temperature in
training too, or the first ratio of new to old probabilities is not 1; values of a critic are never divided.
Legend: n tokens, v vocabulary with padding, p ranks of the group.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from scale_llm.losses.cross_entropy import vocab_parallel_cross_entropy
from scale_llm.losses.vocabulary import Shard, chunks, empty_log_sum, weights_of_ranks, widened
from scale_llm.parallel import collectives
from scale_llm.parallel.fused import fused

_NO_TOKEN = torch.iinfo(torch.int64).max


def vocab_parallel_log_probs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log softmax(logits / temperature)[token] of every token, FP32, in nats.

    logits: [..., v/p]. tokens: [...] ids below vocab_size. The rest as vocab_parallel_cross_entropy.
    """
    return -vocab_parallel_cross_entropy(logits, tokens, tp_group, vocab_size, temperature=temperature)


def vocab_parallel_entropy(
    logits: torch.Tensor, tp_group: dist.ProcessGroup | None, vocab_size: int, temperature: float = 1.0
) -> torch.Tensor:
    """-sum p log p of p = softmax(logits / temperature), FP32, in nats.

    logits: [..., v/p] -> [...]. Where it is only reported, call it under torch.no_grad: its gradient is a second tensor
    of the logits' size.
    """
    assert temperature > 0.0
    return _Entropy.apply(logits, tp_group, vocab_size, temperature)


@torch.no_grad()
def vocab_parallel_argmax_matches(
    logits: torch.Tensor, labels: torch.Tensor, tp_group: dist.ProcessGroup | None, vocab_size: int
) -> torch.Tensor:
    """Whether each label is the most probable token of all; of equal ones the lowest id is.

    logits: [..., v/p], labels: [...] -> bool [...].
    """
    flat = logits.flatten(0, -2)
    shard = Shard.of(flat, tp_group, vocab_size)
    if shard.valid:
        highest, token = flat[:, : shard.valid].max(dim=1)  # the first of equal ones
        token += shard.start
    else:
        highest, token = empty_log_sum(flat), torch.full_like(labels.flatten(), _NO_TOKEN)
    if shard.ranks > 1:
        mine = highest.float()  # gloo reduces no BF16; FP32 holds it exactly
        highest = mine.clone()
        collectives.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp_group)
        token = torch.where(mine == highest, token, _NO_TOKEN)
        collectives.all_reduce(token, op=dist.ReduceOp.MIN, group=tp_group)
    return token.view(labels.shape) == labels


class _Entropy(torch.autograd.Function):
    """Ranks exchange entropies of their own columns, so that no large logits are subtracted from one another.

    With u = this rank's sum of exponentials over the largest rank's, S = sum of u, and h its own entropy,
    H = (sum of u h - u log u) / S + log S, whose terms are all positive.
    """

    @staticmethod
    def forward(ctx, logits, group, vocab_size, temperature):
        flat = logits.flatten(0, -2)
        shard = Shard.of(flat, group, vocab_size)
        log_sum = empty_log_sum(flat)
        entropy = torch.zeros_like(log_sum)
        for rows in chunks(flat, shard):
            _row_entropy(flat[rows, : shard.valid], temperature, log_sum[rows], entropy[rows])
        if shard.ranks > 1:
            weight, highest = weights_of_ranks(log_sum, group)
            sums = torch.stack([weight, weight * entropy + torch.special.entr(weight)])
            collectives.all_reduce(sums, group=group)
            log_sum, entropy = highest + sums[0].log(), sums[1] / sums[0] + sums[0].log()
        ctx.save_for_backward(flat, log_sum, entropy)
        ctx.shard, ctx.temperature = shard, temperature
        return entropy.float().view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """dH/dlogit = -p (log p + H) / temperature."""
        flat, log_sum, entropy = ctx.saved_tensors
        valid = ctx.shard.valid
        scale = widened(grad_output.flatten(), log_sum.dtype, ctx.temperature)
        grad = torch.empty_like(flat)
        grad[:, valid:] = 0
        for rows in chunks(flat, ctx.shard):
            _entropy_gradient(
                flat[rows, :valid], ctx.temperature, log_sum[rows], entropy[rows], scale[rows], grad[rows, :valid]
            )
        return grad.view(*grad_output.shape, -1), None, None, None


@fused
def _row_entropy(x, temperature, log_sum, entropy):
    """x [n, v] -> every row's logarithm of the sum of exponentials and its entropy, into [n] each."""
    x = widened(x, log_sum.dtype, temperature)
    total = torch.logsumexp(x, dim=1)
    log_sum.copy_(total)
    entropy.copy_(torch.special.entr(torch.exp(x - total[:, None])).sum(dim=1))


@fused
def _entropy_gradient(x, temperature, log_sum, entropy, scale, out):
    """The entropy's gradient in x [n, v] times scale [n], into out; zero, not nan, where a probability is zero."""
    probability = torch.exp(widened(x, scale.dtype, temperature) - log_sum[:, None])
    out.copy_((torch.special.entr(probability) - probability * entropy[:, None]) * scale[:, None])
