"""Next-token prediction."""

import torch
import torch.distributed as dist

from scale_llm.losses.cross_entropy import vocab_parallel_cross_entropy
from scale_llm.losses.log_probabilities import vocab_parallel_argmax_matches

Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> (sum, count): the engine adds both over micro-batches and ranks and divides once."""


def language_model_loss(
    logits: torch.Tensor,
    batch: dict[str, torch.Tensor],
    tp_group: dist.ProcessGroup | None,
    vocab_size: int,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Summed cross entropy of the tokens that count, their number, and the same as a metric.

    logits: [s, b, v/tp]. batch: `labels` [b, s] and `loss_mask` [b, s], the weight of a token that counts, else 0; the
    number is the sum of weights.
    """
    mask = batch["loss_mask"].transpose(0, 1).float()
    labels = batch["labels"].transpose(0, 1)
    losses = vocab_parallel_cross_entropy(logits, labels, tp_group, vocab_size, label_smoothing=label_smoothing)
    loss_sum, count = (losses * mask).sum(), mask.sum()
    return loss_sum, count, {"lm loss": (loss_sum.detach(), count)}


def counted_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the loss of these rows is divided by; batch: `loss_mask` [b, s]."""
    return batch["loss_mask"].sum()


def with_token_accuracy(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], tp_group: dist.ProcessGroup | None, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """The same, and the share of tokens that count which are the likeliest ones, as the metric `token accuracy`."""
    loss_sum, count, metrics = language_model_loss(logits, batch, tp_group, vocab_size)
    counted = (batch["loss_mask"].transpose(0, 1) > 0).float()
    right = vocab_parallel_argmax_matches(logits, batch["labels"].transpose(0, 1), tp_group, vocab_size)
    return loss_sum, count, {**metrics, "token accuracy": ((right * counted).sum(), counted.sum())}
