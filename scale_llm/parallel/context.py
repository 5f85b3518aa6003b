"""The sequence cut over context-parallel ranks.

Rank r of c holds chunks r and 2c-1-r of 2c, as Megatron and Transformer Engine cut it: causal attention is then the
same work on every rank.
"""

import torch
import torch.distributed as dist

from scale_llm.parallel import collectives


def sequence_chunks(group: dist.ProcessGroup) -> tuple[int, int]:
    """Which two of the 2c chunks this rank holds, in the order it holds them."""
    rank, size = group.rank(), group.size()
    return rank, 2 * size - 1 - rank


def shard_sequence(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's two chunks of `x` along `dim`, joined."""
    if group is None or group.size() == 1:
        return x
    chunks = x.chunk(2 * group.size(), dim=dim)
    first, second = sequence_chunks(group)
    return torch.cat([chunks[first], chunks[second]], dim=dim)


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[s/c, ...] of every rank -> [s, ...] in natural order; the gradient is summed over ranks and cut again."""
    return _GatherSequence.apply(x, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        size = group.size()
        gathered = x.new_empty((size * x.size(0), *x.shape[1:]))
        collectives.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        halves = gathered.view(size, 2, x.size(0) // 2, *x.shape[1:])
        return torch.cat([halves[:, 0].flatten(0, 1), halves[:, 1].flip(0).flatten(0, 1)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        collectives.all_reduce(grad, group=ctx.group)
        return shard_sequence(grad, 0, ctx.group), None
