"""Losses of preferred and rejected answers, from the log-probabilities of whole answers.

Every loss gives one value a pair, [n]; the caller adds them up and divides by the pairs of the whole batch.
DPO, cDPO, robust DPO and the hinge take sums over an answer's tokens; IPO, SimPO and ORPO take means, which they form
themselves. Rewards are in nats times beta. Legend: n pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from scale_llm.losses.language_model import Metrics
from scale_llm.losses.sequences import masked_sum


class Pairs(NamedTuple):
    """Log-probabilities of answers, summed over their tokens, and the tokens in each; all [n].

    The reference's are None where a loss needs none, the tokens where it takes sums.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor | None = None
    reference_rejected: torch.Tensor | None = None
    chosen_tokens: torch.Tensor | None = None
    rejected_tokens: torch.Tensor | None = None


def per_token(pairs: Pairs) -> Pairs:
    """Log-probabilities as means over tokens: length normalisation for any of the losses. An empty answer gives 0."""
    assert pairs.chosen_tokens is not None and pairs.rejected_tokens is not None, "no token counts"
    chosen, rejected = pairs.chosen_tokens.clamp(min=1), pairs.rejected_tokens.clamp(min=1)
    return Pairs(
        pairs.chosen / chosen,
        pairs.rejected / rejected,
        None if pairs.reference_chosen is None else pairs.reference_chosen / chosen,
        None if pairs.reference_rejected is None else pairs.reference_rejected / rejected,
        torch.ones_like(chosen),
        torch.ones_like(rejected),
    )


def dpo(pairs: Pairs, *, beta: float = 0.1) -> torch.Tensor:
    """-log sigmoid(beta h), h the difference of log-ratios to the reference (Rafailov et al. 2023, eq. 7). [n]"""
    return -F.logsigmoid(beta * _difference(pairs))


def cdpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO where a label is wrong with probability e (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).

    (1 - e) * DPO + e * DPO of the swapped pair. [n]
    """
    right, wrong = _both_ways(pairs, beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def robust_dpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO without the bias of labels that are wrong with probability e < 1/2 (Chowdhury et al. 2024, section 3).

    ((1 - e) * DPO - e * DPO of the swapped pair) / (1 - 2e): its mean over flipped labels is DPO's. [n]
    """
    assert 0.0 <= label_smoothing < 0.5
    right, wrong = _both_ways(pairs, beta)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float = 0.1) -> torch.Tensor:
    """(h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17, where beta is tau). [n]

    Of means over tokens, as Hugging Face's TRL; the paper writes log p of the whole answer.
    """
    return (_difference(per_token(pairs)) - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: float = 0.1) -> torch.Tensor:
    """max(0, 1 - beta h) (Liu et al. 2023, "Statistical rejection sampling", hinge-norm). [n]

    With zeros for the reference: the calibration of SLiC-HF (Zhao et al. 2023) with margin 1 / beta, times beta.
    """
    return torch.relu(1 - beta * _difference(pairs))


def simpo(pairs: Pairs, *, beta: float = 2.0, margin: float = 1.0) -> torch.Tensor:
    """-log sigmoid(beta (mean log p chosen - mean log p rejected) - margin) (Meng et al. 2024, eq. 6). [n]

    margin: the paper's gamma itself; its authors' code takes gamma / beta. No reference.
    """
    means = per_token(pairs)
    return -F.logsigmoid(beta * (means.chosen - means.rejected) - margin)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> torch.Tensor:
    """The chosen answer's mean negative log-likelihood plus beta * odds_ratio (Hong et al. 2024, eq. 6). [n]

    beta is the paper's lambda. No reference. The first term is a mean per answer, as in the paper; TRL's is one over
    the tokens of a micro-batch.
    """
    return chosen_nll(pairs) + beta * odds_ratio(pairs)


def odds_ratio(pairs: Pairs) -> torch.Tensor:
    """-log sigmoid(log odds chosen - log odds rejected), odds = p / (1 - p), of mean log p (ibid., eq. 7). [n]"""
    means = per_token(pairs)
    return -F.logsigmoid(_log_odds(means.chosen) - _log_odds(means.rejected))


def chosen_nll(pairs: Pairs) -> torch.Tensor:
    """Mean negative log-likelihood of the chosen answers' tokens: an SFT term for any loss (RPO, Pang et al. 2024). [n]

    For one over all tokens of the batch, not answer by answer, sum -pairs.chosen and pairs.chosen_tokens instead.
    """
    return -per_token(pairs).chosen


def kto(
    log_ratio: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Answers judged one by one (Ethayarajh et al. 2024, section 4.1). [n]

    log_ratio: [n] log p - reference's, summed over tokens. desirable: bool [n]. kl: the reference point z0 of
    kto_reference_point, a constant. weight * (1 - sigmoid(+-beta (log_ratio - z0))), + where desirable.
    """
    advantage = beta * (log_ratio - kl.detach())
    good = desirable_weight * torch.sigmoid(-advantage)  # 1 - sigmoid(x), without the cancellation
    bad = undesirable_weight * torch.sigmoid(advantage)
    return torch.where(desirable.bool(), good, bad)


@torch.no_grad()
def kto_reference_point(log_ratio_sum: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """z0 = max(0, mean log-ratio of answers paired with other answers' prompts), already summed over all ranks.

    count: of answers, or the sum of their weights; 0 gives 0.
    """
    return (log_ratio_sum / torch.where(count > 0, count, 1)).clamp(min=0)


PAIR_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "dpo": dpo,
    "cdpo": cdpo,
    "robust_dpo": robust_dpo,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "orpo": orpo,
}
"""Name -> loss(pairs, **options) -> [n]. KTO has no pairs and stands apart."""

REFERENCE_FREE = frozenset({"simpo", "orpo"})
"""The losses that need no reference model."""

OF_MEANS = frozenset({"ipo", "simpo", "orpo"})
"""The losses of mean log-probabilities, whose metrics are of means too."""


def preference_loss(name: str, pairs: Pairs, **options: float) -> torch.Tensor:
    """The loss of that name, [n]. options: its keyword arguments."""
    if name not in PAIR_LOSSES:
        raise ValueError(f"no preference loss {name!r}; there are {', '.join(PAIR_LOSSES)}")
    return PAIR_LOSSES[name](pairs, **options)


@torch.no_grad()
def preference_metrics(pairs: Pairs, *, beta: float, counts: torch.Tensor | None = None) -> Metrics:
    """Sums over pairs and their number. counts: [n], 0 where a pair is only padding.

    Rewards are beta * (log p - reference's), or beta * log p without a reference; for losses that take means, pass
    per_token(pairs). Equal rewards count as wrong.
    """
    chosen = beta * _log_ratio(pairs.chosen, pairs.reference_chosen)
    rejected = beta * _log_ratio(pairs.rejected, pairs.reference_rejected)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    mask = torch.ones_like(chosen) if counts is None else counts
    return {name: masked_sum(value, mask) for name, value in values.items()}


@torch.no_grad()
def kto_metrics(
    log_ratio: torch.Tensor, desirable: torch.Tensor, *, beta: float, counts: torch.Tensor | None = None
) -> Metrics:
    """Rewards of desirable and of undesirable answers, each with its own count. All [n]."""
    mask = torch.ones_like(desirable, dtype=torch.bool) if counts is None else counts.bool()
    return {
        "rewards/chosen": masked_sum(beta * log_ratio, mask & desirable.bool()),
        "rewards/rejected": masked_sum(beta * log_ratio, mask & ~desirable.bool()),
    }


def _log_ratio(log_probs, reference):
    return log_probs if reference is None else log_probs - reference


def _difference(pairs: Pairs) -> torch.Tensor:
    """h [n]. Policy less reference first: both are in the thousands, and nearly equal."""
    assert pairs.reference_chosen is not None and pairs.reference_rejected is not None, "no reference"
    return (pairs.chosen - pairs.reference_chosen) - (pairs.rejected - pairs.reference_rejected)


def _both_ways(pairs: Pairs, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    difference = beta * _difference(pairs)
    return -F.logsigmoid(difference), -F.logsigmoid(-difference)


def _log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)). A probability of one is infinite odds; an FP32 step below it, the odds are 16 nats."""
    log_p = log_p.clamp(max=-1e-7)
    return log_p - torch.log(-torch.expm1(log_p))
