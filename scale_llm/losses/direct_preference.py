"""The loss of a batch of answers from the policy's logits: their log-probabilities, then the DPO family or KTO.

Legend: s sequence, b batch, v vocabulary, p tensor-parallel ranks, c context-parallel ranks, n sequences (of pairs two
each, the chosen one first).

An answer or a pair of weight w counts as w of them in the loss and in what it is divided by. Other metrics are of those
whose weight is not 0, each counted once: of these an interval of accuracy is taken.
"""

from typing import TypeAlias

import torch
import torch.distributed as dist

from scale_llm.losses.language_model import Metrics
from scale_llm.losses.log_probabilities import vocab_parallel_log_probs
from scale_llm.losses.preference import (
    OF_MEANS,
    Pairs,
    chosen_nll,
    kto,
    kto_metrics,
    per_token,
    preference_loss,
    preference_metrics,
)
from scale_llm.losses.sequences import masked_sum, segment_sums

Group: TypeAlias = dist.ProcessGroup | None


def answer_log_probs(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], tp_group: Group, cp_group: Group, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every answer, summed over its tokens, and how many those are; both [n], on every rank of c.

    logits: [s/c, b, v/p]. batch: `labels`, `loss_mask` (not 0 in answers) and `segments`, [b, s/c]; `numbers` [n].
    """
    labels, mask, segments = (batch[key].transpose(0, 1) for key in ("labels", "loss_mask", "segments"))
    tokens = vocab_parallel_log_probs(logits, labels, tp_group, vocab_size)
    count = max(batch["numbers"].numel(), 1)
    return segment_sums(tokens, mask, segments, count, cp_group)


def unpaired_loss(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], tp_group: Group, cp_group: Group, vocab_size: int, *,
    beta: float, desirable_weight: float, undesirable_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:  # fmt: skip
    """Summed KTO loss of single answers, the sum of their weights, and metrics.

    batch: also `sequence_weights` [n], `reference` [n], the same of the reference, `desirable` bool [n], and `kl` [],
    the reference point z0 of the whole global batch. An answer is judged right if it is desirable and more likely than
    z0 allows, or neither.
    """
    sums, _ = answer_log_probs(logits, batch, tp_group, cp_group, vocab_size)
    share = 1.0 / (cp_group.size() if cp_group is not None else 1)
    if not batch["numbers"].numel():  # a rank without an answer takes part all the same
        desirable, log_ratio = torch.ones(1, dtype=torch.bool, device=sums.device), sums
        weights = torch.zeros_like(sums)
    else:
        desirable = batch["desirable"].to(sums.device)
        log_ratio = sums - batch["reference"].to(sums)
        weights = batch["sequence_weights"].to(sums)
    kl = batch["kl"].to(sums)
    losses = kto(
        log_ratio, desirable, kl, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    total, count = (losses * weights).sum(), weights.sum().to(torch.float32) * share
    right, number = masked_sum(((log_ratio.detach() > kl) == desirable).to(torch.float32), weights)
    metrics = {
        "dpo loss": (total.detach() * share, count),
        "rewards/accuracies": (right * share, number * share),
        "kl": (kl * number * share, number * share),
    }
    for key, (value, number) in kto_metrics(log_ratio.detach(), desirable, beta=beta, counts=weights).items():
        metrics[key] = (value * share, number * share)
    return total, count, metrics


def pair_loss(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], tp_group: Group, cp_group: Group, vocab_size: int, *,
    name: str, options: dict[str, float], length_normalised: bool, sft_coeff: float,
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:  # fmt: skip
    """Summed loss of the pairs, the sum of their weights, and metrics.

    batch: also `sequence_weights` [n], those of a pair the same, and `reference` [n], the same of the reference; absent
    for losses without one. options: of the named loss in `losses.preference`. Each of the c ranks that share the pairs
    counts its share of them, as their sums are added up. Rewards and log-probabilities in metrics are means over tokens
    where the loss is of such.
    """
    sums, tokens = answer_log_probs(logits, batch, tp_group, cp_group, vocab_size)
    share = 1.0 / (cp_group.size() if cp_group is not None else 1)
    if not batch["numbers"].numel():  # a rank without a pair takes part all the same
        sums, tokens = sums.expand(2), tokens.expand(2)
        weights = torch.zeros_like(sums[0::2])
    else:
        weights = batch["sequence_weights"][0::2].to(sums)
    reference = batch.get("reference")
    if reference is not None:
        reference = reference.to(sums.device) if reference.numel() else torch.zeros_like(sums)
    pairs = Pairs(
        sums[0::2],
        sums[1::2],
        None if reference is None else reference[0::2].to(sums.dtype),
        None if reference is None else reference[1::2].to(sums.dtype),
        tokens[0::2],
        tokens[1::2],
    )
    means = per_token(pairs)
    losses = preference_loss(name, means if length_normalised else pairs, **options)
    if sft_coeff:
        losses = losses + sft_coeff * chosen_nll(pairs)
    total, count = (losses * weights).sum(), weights.sum().to(torch.float32) * share
    metrics = {"dpo loss": (total.detach() * share, count)}
    seen = means if length_normalised or name in OF_MEANS else pairs
    for key, (value, number) in preference_metrics(seen, beta=options.get("beta", 1.0), counts=weights).items():
        metrics[key] = (value * share, number * share)
    return total, count, metrics


def counted_answers(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `unpaired_loss` is divided by; batch: `sequence_weights` [n]."""
    return batch["sequence_weights"].sum()
