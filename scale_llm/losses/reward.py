"""Losses of reward models: which of several answers is better. One value a pair or list. Legend: n pairs, k answers.

A pair or list of weight w counts as w of them in the loss and in what it is divided by. Other metrics are of those
whose weight is not 0, each counted once.
"""

from typing import TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F

from scale_llm.losses.language_model import Metrics
from scale_llm.losses.sequences import masked_sum, segment_sums

Group: TypeAlias = dist.ProcessGroup | None

BINS = 10
CALIBRATION = "calibration/"
"""What the sums of calibration_bins begin with."""

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


def reward_loss(
    scores: torch.Tensor, batch: dict[str, torch.Tensor], cp_group: Group, *, centring: float = 0.0,
    calibrated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:  # fmt: skip
    """Summed Bradley-Terry loss of the pairs of a batch, the sum of their weights, and metrics.

    scores: [s/c, b, 1], one for every token. batch: `loss_mask` (not 0 at the tokens whose mean score is the
    sequence's) and `segments`, [b, s/c]; `numbers`, `sequence_weights` and `margins` [2 n], of the chosen and the
    rejected sequence of each pair in turn. Each of the c ranks of cp_group counts its share of the pairs, as their sums
    are added up. calibrated: the sums of `calibration_bins` too.
    """
    values, share = sequence_scores(scores, batch, cp_group, least=2)
    chosen, rejected = values[0::2], values[1::2]
    margin = batch["margins"][0::2].to(values) if share else 0.0
    losses = bradley_terry(chosen, rejected, margin=margin, centring=centring)
    weights = batch["sequence_weights"][0::2].to(losses) if share else torch.zeros_like(losses)
    total, count = (losses * weights).sum(), weights.sum().to(torch.float32) * share
    metrics = {"reward loss": (total.detach() * share, count)}
    counted = weights != 0
    found = reward_metrics(chosen, rejected, counted)
    if calibrated:
        found |= calibration_bins(chosen[counted], rejected[counted])
    metrics |= {name: (value * share, number * share) for name, (value, number) in found.items()}
    return total, count, metrics


def ranking_loss(
    scores: torch.Tensor, batch: dict[str, torch.Tensor], cp_group: Group
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Summed Plackett-Luce loss of the lists of a batch, the sum of their weights, and metrics.

    As reward_loss, but batch has `lists` int64 [n] in place of margins: which list, from 0, each sequence is of; those
    of a list lie behind each other, best first.
    """
    values, share = sequence_scores(scores, batch, cp_group, least=2)
    lists = batch["lists"].to(values.device) if share else torch.zeros(2, dtype=torch.int64, device=values.device)
    table, valid = _table(values, lists)
    losses = plackett_luce(table, valid)
    # Of a list its first one's; an empty rank has one list
    weights = _table(batch["sequence_weights"].to(values), lists)[0][:, 0] if share else torch.zeros_like(losses)
    total, count = (losses * weights).sum(), weights.sum().to(torch.float32) * share
    counted = weights != 0
    right, pairs = ranking_accuracy(table, valid & counted[:, None])
    best, worst = table[:, 0].detach(), table.detach().gather(1, valid.sum(dim=1, keepdim=True) - 1)[:, 0]
    metrics = {"reward loss": (total.detach() * share, count), "rewards/accuracies": (right * share, pairs * share)}
    for name, value in (("chosen", best), ("rejected", worst), ("margins", best - worst)):
        found, number = masked_sum(value, counted)
        metrics[f"rewards/{name}"] = (found * share, number * share)
    return total, count, metrics


def counted_lists(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `ranking_loss` is divided by; batch: `sequence_weights` and `lists`, [n]."""
    lists = batch["lists"]
    return batch["sequence_weights"][lists.diff(prepend=lists.new_tensor([-1])) != 0].sum()


def sequence_scores(
    scores: torch.Tensor, batch: dict[str, torch.Tensor], cp_group: Group, *, least: int = 1
) -> tuple[torch.Tensor, float]:
    """The score of every sequence, [n], and the share of their sums that this rank of c counts: 0 where there are none,
    and then `least` values stand in, so that the rank takes part all the same."""
    mask, segments = (batch[key].transpose(0, 1) for key in ("loss_mask", "segments"))
    count = batch["numbers"].numel()
    sums, tokens = segment_sums(scores[..., 0], mask, segments, count or least, cp_group)
    return sums / tokens.clamp(min=1), (1.0 if count else 0.0) / (cp_group.size() if cp_group is not None else 1)


@torch.no_grad()
def calibration_bins(chosen: torch.Tensor, rejected: torch.Tensor, bins: int = BINS) -> Metrics:
    """For each of equal parts of [1/2, 1]: how sure the model was of pairs there, and how often it was right.

    Sure: sigmoid(|chosen - rejected|), Bradley-Terry's probability of the order that the model gives. chosen, rejected:
    [n]. `calibration/i/confidence` and `calibration/i/accuracy` are sums over the pairs of part i, and their number.
    """
    sure = torch.sigmoid((chosen - rejected).abs())
    place = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    right = (chosen > rejected).to(sure.dtype)
    found: Metrics = {}
    for part in range(bins):
        here = place == part
        found[f"{CALIBRATION}{part}/confidence"] = masked_sum(sure, here)
        found[f"{CALIBRATION}{part}/accuracy"] = masked_sum(right, here)
    return found


def _table(values: torch.Tensor, lists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values [n] of lists behind each other -> [lists, longest], and where a list has a value."""
    sizes = torch.bincount(lists)
    place = torch.arange(len(lists), device=lists.device) - (sizes.cumsum(0) - sizes)[lists]
    table = values.new_zeros(len(sizes), int(sizes.max())).index_put((lists, place), values)
    valid = torch.arange(table.size(1), device=lists.device) < sizes[:, None]
    return table, valid
