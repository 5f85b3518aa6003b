"""Sums over tokens, and over the tokens of each sequence, of padded or packed batches.

A loss is a sum and a count, divided once by the count of all micro-batches and ranks: a mean per micro-batch weighs
its tokens by how few they are. Legend: s sequence, b batch, n segments (sequences of a padded or packed batch).
"""

import torch
import torch.distributed as dist

from scale_llm.parallel import collectives


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the values whose mask is not 0, and how many those are. values, mask: [...].

    What lies under the mask may be infinite or nan.
    """
    kept = mask.bool()
    return torch.where(kept, values, 0).sum(), kept.sum().to(torch.float32)


def segment_sums(
    values: torch.Tensor,
    mask: torch.Tensor,
    segments: torch.Tensor,
    num_segments: int,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [n] of the values under the mask per segment, and the tokens [n] in each, FP32 or wider.

    values, mask, segments: one shape, [s, b] or any other. segments: ids 0 to n-1; below 0 belongs to none.
    cp_group: ranks that hold parts of the same segments. All of them then get the whole sums, and the gradient of
    each rank's values is its own part. A loss of these sums is thus whole on every rank: run backward on it as it is,
    but divide by the group's size what is added up over ranks (the reported sum, and the count that gradients are
    divided by).
    """
    kept = (mask.bool() & (segments >= 0)).flatten()
    ids = segments.flatten().clamp(min=0)
    dtype = torch.promote_types(values.dtype, torch.float32)
    tokens = torch.stack([torch.where(kept, values.flatten(), 0).to(dtype), kept.to(dtype)], dim=1)
    sums = tokens.new_zeros(num_segments, 2).index_add(0, ids, tokens)
    if cp_group is not None and cp_group.size() > 1:
        sums = _SumOverRanks.apply(sums, cp_group)
    return sums[:, 0], sums[:, 1].detach()


def spread(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The value of each token's segment. values: [n], segments: [s, b] ids -> [s, b]; 0 where the id is below 0."""
    return torch.where(segments >= 0, values[segments.clamp(min=0)], 0)


class _SumOverRanks(torch.autograd.Function):
    """The sum on every rank. Each rank's loss is the whole one, so its part's gradient is the whole gradient."""

    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        collectives.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def counted_pairs(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What losses of pairs are divided by; batch: `sequence_weights` [2 n], those of a pair the same."""
    return batch["sequence_weights"][0::2].sum()
