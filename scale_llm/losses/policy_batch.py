"""The losses of a micro-batch of sampled answers: the policy's from its logits, the critic's from its values.

What lies at a place belongs to the token that follows it, the label there. Legend: s sequence, b batch, v vocabulary,
p tensor-parallel ranks, c context-parallel ranks.
"""

from typing import TypeAlias

import torch
import torch.distributed as dist

from scale_llm.losses.language_model import Metrics
from scale_llm.losses.log_probabilities import vocab_parallel_entropy, vocab_parallel_log_probs
from scale_llm.losses.policy import (
    KL_ESTIMATORS,
    clipped_policy_loss,
    clipped_value_loss,
    entropy_bonus,
    gspo_token_log_ratio,
    policy_metrics,
    sequence_log_ratio,
    truncated_importance_weights,
)
from scale_llm.losses.sequences import masked_sum, spread

Group: TypeAlias = dist.ProcessGroup | None
Batch: TypeAlias = dict[str, torch.Tensor]


def policy_batch_loss(
    logits: torch.Tensor, batch: Batch, tp_group: Group, cp_group: Group, vocab_size: int, *, temperature: float,
    clip_low: float, clip_high: float, dual_clip: float | None, of_sequences: bool, entropy_coeff: float,
    kl: str | None, kl_coef: float, importance_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:  # fmt: skip
    """Summed loss of the tokens of answers, what it is to be divided by, and metrics.

    logits: [s/c, b, v/p]. batch, [b, s/c]: `labels`, `loss_mask` (not 0 in answers), `segments`; `old_log_probs`,
    `advantages`; `weights` of each token's loss and `shares` of each in the divisor; with kl `reference_log_probs`;
    with importance_cap `sampled_log_probs`, those of the rollout. `numbers` [n]. of_sequences: GSPO's ratios.
    """
    part = {
        name: batch[name].transpose(0, 1)
        for name in ("labels", "loss_mask", "segments", "old_log_probs", "advantages", "weights", "shares")
    }
    mask, old, advantages = part["loss_mask"] != 0, part["old_log_probs"], part["advantages"]
    log_probs = vocab_parallel_log_probs(logits, part["labels"], tp_group, vocab_size, temperature)
    difference = torch.where(mask, log_probs - old, 0)
    log_ratio = difference
    if of_sequences:
        means = sequence_log_ratio(difference, mask, part["segments"], max(batch["numbers"].numel(), 1), cp_group)
        log_ratio = gspo_token_log_ratio(difference, spread(means, part["segments"]))
    policy = clipped_policy_loss(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    if importance_cap is not None:
        sampled = batch["sampled_log_probs"].transpose(0, 1)
        policy = policy * truncated_importance_weights(old, sampled, cap=importance_cap)
    total = policy
    if entropy_coeff:
        entropy = vocab_parallel_entropy(logits, tp_group, vocab_size, temperature)
        total = total + entropy_bonus(entropy, coefficient=entropy_coeff)
    else:
        with torch.no_grad():
            entropy = vocab_parallel_entropy(logits, tp_group, vocab_size, temperature)
    weights, divisor = torch.where(mask, part["weights"], 0), torch.where(mask, part["shares"], 0).double().sum()
    metrics = {"actor/pg_loss": ((policy.detach() * weights).sum(), divisor)}
    if kl is not None:
        apart = torch.where(mask, log_probs - batch["reference_log_probs"].transpose(0, 1), 0)
        penalty = KL_ESTIMATORS[kl](apart)
        total = total + kl_coef * penalty
        metrics["actor/kl_loss"] = ((penalty.detach() * weights).sum(), divisor)
    cut = policy_metrics(
        log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )  # fmt: skip
    clipped, tokens = cut["policy/clipped high"][0] + cut["policy/clipped low"][0], cut["policy/ratio"][1]
    metrics |= {
        "actor/pg_clipfrac": (clipped, tokens),
        "actor/pg_clipfrac_lower": cut["policy/dual clipped"],
        "actor/ppo_kl": masked_sum(-difference.detach(), mask),
        "actor/ratio": cut["policy/ratio"],
        "actor/entropy": masked_sum(entropy.detach(), mask),
    }
    return (total * weights).sum(), divisor, metrics


def value_batch_loss(values: torch.Tensor, batch: Batch, *, clip: float) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Summed clipped loss of the values of answers, their tokens, and metrics.

    values: [s/c, b, 1]. batch, [b, s/c]: `loss_mask`, `old_values`, `returns`.
    """
    mask, old, returns = (batch[name].transpose(0, 1) for name in ("loss_mask", "old_values", "returns"))
    kept, values = mask != 0, values[..., 0].float()
    losses = torch.where(kept, clipped_value_loss(values, old, returns, clip=clip), 0)
    tokens = kept.sum().to(torch.float32)
    larger = losses.detach() > 0.5 * (values.detach() - returns).square()
    clipped = ((values - old).abs() > clip) & larger  # within the clip both are one number but for rounding
    metrics = {
        "critic/vf_loss": (losses.detach().sum(), tokens),
        "critic/vf_clipfrac": masked_sum(clipped.to(torch.float32), kept),
    }
    return losses.sum(), tokens, metrics


@torch.no_grad()
def answer_token_log_probs(
    logits: torch.Tensor, batch: Batch, tp_group: Group, vocab_size: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cells, log-probabilities) of the tokens of answers, both [m]. batch, [b, s/c]: `labels`, `cells`, -1 where no
    answer is."""
    labels, cells = batch["labels"].transpose(0, 1), batch["cells"].transpose(0, 1)
    found = vocab_parallel_log_probs(logits, labels, tp_group, vocab_size, temperature)
    return cells[cells >= 0], found[cells >= 0]


@torch.no_grad()
def answer_token_values(values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(cells, values) likewise, of a model with a head of one number. values: [s/c, b, 1]."""
    cells = batch["cells"].transpose(0, 1)
    return cells[cells >= 0], values[..., 0].float()[cells >= 0]


def counted_shares(batch: Batch) -> torch.Tensor:
    """What `policy_batch_loss` is divided by; batch: `loss_mask` and `shares`, [b, s]."""
    return torch.where(batch["loss_mask"] != 0, batch["shares"], 0).double().sum()


def counted_values(batch: Batch) -> torch.Tensor:
    """What `value_batch_loss` is divided by; batch: `loss_mask` [b, s]."""
    return (batch["loss_mask"] != 0).sum()
