"""The loss of a batch of answers from the policy's logits: their log-probabilities, then the DPO family or KTO.

Legend: s sequence, b batch, v vocabulary, p tensor-parallel ranks, c context-parallel ranks, n sequences (of pairs two
each, the chosen one first).
"""

from typing import TypeAlias

import torch
import torch.distributed as dist

from scale_llm.losses.language_model import Metrics
from scale_llm.losses.log_probabilities import vocab_parallel_log_probs
from scale_llm.losses.preference import (
    Pairs,
    chosen_nll,
    kto,
    kto_metrics,
    per_token,
    preference_loss,
    preference_metrics,
)
from scale_llm.losses.sequences import segment_sums

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
    """Summed KTO loss of single answers, their number, and metrics.

    batch: also `reference` [n], the same of the reference, `desirable` bool [n], and `kl` [], the reference point z0 of
    the whole global batch. An answer is judged right if it is desirable and more likely than z0 allows, or neither.
    """
    sums, _ = answer_log_probs(logits, batch, tp_group, cp_group, vocab_size)
    answers = batch["numbers"].numel()
    share = (1.0 if answers else 0.0) / (cp_group.size() if cp_group is not None else 1)
    if not answers:  # a rank without an answer takes part all the same
        desirable, log_ratio = torch.ones(1, dtype=torch.bool, device=sums.device), sums
    else:
        desirable = batch["desirable"].to(sums.device)
        log_ratio = sums - batch["reference"].to(sums)
    kl = batch["kl"].to(sums)
    losses = kto(
        log_ratio, desirable, kl, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    count = torch.tensor(losses.numel() * share, dtype=torch.float32, device=losses.device)
    right = ((log_ratio.detach() > kl) == desirable).to(torch.float32).sum()
    metrics = {
        "dpo loss": (losses.detach().sum() * share, count),
        "rewards/accuracies": (right * share, count),
        "kl": (kl * count, count),
    }
    for key, (value, number) in kto_metrics(log_ratio.detach(), desirable, beta=beta).items():
        metrics[key] = (value * share, number * share)
    return losses.sum() if answers else losses.sum() * 0.0, count, metrics


def pair_loss(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], tp_group: Group, cp_group: Group, vocab_size: int, *,
    name: str, options: dict[str, float], length_normalised: bool, sft_coeff: float,
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:  # fmt: skip
    """Summed loss of the pairs, their number, and metrics.

    batch: also `reference` [n], the same of the reference; absent for losses without one. options: of the named loss in
    `losses.preference`. Each of the c ranks that share the pairs counts its share of them, as their sums are added up.
    """
    sums, tokens = answer_log_probs(logits, batch, tp_group, cp_group, vocab_size)
    share = 1.0 / (cp_group.size() if cp_group is not None else 1)
    if not batch["numbers"].numel():  # a rank without a pair takes part all the same
        sums, tokens = sums.expand(2), tokens.expand(2)
        share = 0.0
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
    seen = per_token(pairs) if length_normalised else pairs
    losses = preference_loss(name, seen, **options)
    if sft_coeff:
        losses = losses + sft_coeff * chosen_nll(pairs)
    total = losses.sum() if share else losses.sum() * 0.0
    count = torch.tensor(losses.numel() * share, dtype=torch.float32, device=losses.device)
    metrics = {"dpo loss": (losses.detach().sum() * share, count)}
    for key, (value, _) in preference_metrics(seen, beta=options.get("beta", 1.0)).items():
        metrics[key] = (value * share, count)
    return total, count, metrics
