"""Losses of reward models: which of several answers is better. One value a pair or list. Legend: n pairs, k answers."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from scale_llm.losses.language_model import Metrics
from scale_llm.losses.sequences import masked_sum, segment_sums

_LOWEST = -1e30
"""A score that weighs nothing; minus infinity would make gradients nan."""


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, *, margin: torch.Tensor | float = 0.0, centring: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(chosen - rejected - margin) + centring * (chosen + rejected)^2. [n]

    chosen, rejected: [n] scores (Ouyang et al. 2022, eq. 1, for pairs). margin: how clear the preference is (Touvron
    et al. 2023, eq. 2), [n] or one for all. centring: keeps the scores' mean, which the first term leaves free, near 0
    (Eisenstein et al. 2023).
    """
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + centring * (chosen + rejected).square() if centring else loss


def plackett_luce(scores: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """-log probability of a ranking: sum over places i of logsumexp(scores from i on) - scores[i]. [n]

    scores: [n, k], best first. valid: [n, k], 0 from where a list has ended. With k = 2 it is Bradley-Terry.
    (Plackett 1975; for language models Rafailov et al. 2023, appendix A.3.)
    """
    kept = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.bool()
    scores = torch.where(kept, scores, _LOWEST)
    rest = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(kept, rest - scores, 0).sum(-1)


@torch.no_grad()
def reward_metrics(chosen: torch.Tensor, rejected: torch.Tensor, counts: torch.Tensor | None = None) -> Metrics:
    """Sums over pairs [n] and their number. counts: [n], 0 where a pair is only padding. Equal scores are wrong."""
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(torch.float32),
        "rewards/margins": chosen - rejected,
    }
    mask = torch.ones_like(chosen) if counts is None else counts
    return {name: masked_sum(value, mask) for name, value in values.items()}


@torch.no_grad()
def ranking_accuracy(scores: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """How many pairs of every list are in the right order, and how many pairs there are. scores: [n, k], best first."""
    kept = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.bool()
    right = scores[:, :, None] > scores[:, None, :]
    pairs = (kept[:, :, None] & kept[:, None, :]).triu(diagonal=1)
    return masked_sum(right.to(torch.float32), pairs)


def pair_reward_loss(
    scores: torch.Tensor, batch: dict[str, torch.Tensor], cp_group: dist.ProcessGroup | None, *, centring: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Summed Bradley-Terry loss of the pairs of a batch, their number, and metrics.

    scores: [s/c, b, 1], one for every token. batch: `loss_mask` (not 0 at the token whose score is the sequence's) and
    `segments`, [b, s/c]; `numbers` and `margins` [2 n], of the chosen and the rejected sequence of each pair in turn.
    Each of the c ranks of cp_group counts its share of the pairs, as their sums are added up.
    """
    mask, segments = (batch[key].transpose(0, 1) for key in ("loss_mask", "segments"))
    count = batch["numbers"].numel()
    values, _ = segment_sums(scores[..., 0], mask, segments, max(count, 2), cp_group)
    share = (1.0 if count else 0.0) / (cp_group.size() if cp_group is not None else 1)
    chosen, rejected = values[0::2], values[1::2]
    margin = batch["margins"][0::2].to(values) if count else 0.0
    losses = bradley_terry(chosen, rejected, margin=margin, centring=centring)
    pairs = torch.tensor(losses.numel() * share, dtype=torch.float32, device=losses.device)
    metrics = {"reward loss": (losses.detach().sum() * share, pairs)}
    for name, (value, _) in reward_metrics(chosen, rejected).items():
        metrics[name] = (value * share, pairs)
    return losses.sum() if count else losses.sum() * 0.0, pairs, metrics
