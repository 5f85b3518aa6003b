"""Next-token prediction."""

import torch
import torch.distributed as dist

from scale_llm.losses.cross_entropy import vocab_parallel_cross_entropy

Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> (sum, count): the engine adds both over micro-batches and ranks and divides once."""


def language_model_loss(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], tp_group: dist.ProcessGroup | None, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Summed cross entropy of the tokens that count, their number, and the same as a metric.

    logits: [s, b, v/tp]. batch: `labels` [b, s] and `loss_mask` [b, s], 1 where a token counts.
    """
    mask = batch["loss_mask"].transpose(0, 1).float()
    losses = vocab_parallel_cross_entropy(logits, batch["labels"].transpose(0, 1), tp_group, vocab_size)
    loss_sum, count = (losses * mask).sum(), mask.sum()
    return loss_sum, count, {"lm loss": (loss_sum.detach(), count)}
