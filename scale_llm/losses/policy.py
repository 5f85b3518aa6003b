"""Losses of policy optimisation, one value a token (or a sequence, for GSPO).

Log-probabilities are in nats, at the sampling temperature. The caller sums under the mask of the trainable tokens and
divides by the count of the whole batch. Legend: s sequence, b batch, n sequences; [...] is any one shape.
"""

import torch
import torch.distributed as dist

from scale_llm.losses.language_model import Metrics
from scale_llm.losses.sequences import masked_sum, segment_sums

_LARGEST = 20.0
"""Log-ratios beyond it are cut and give no gradient: exp(89) is infinite in FP32, and infinity * 0 is nan."""


def clipped_policy_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(log_ratio) (Schulman et al. 2017, eq. 7). [...]

    log_ratio: [...] log p - log p of the policy that sampled: of tokens, or of sequences (sequence_log_ratio).
    clip_high above clip_low is DAPO's clip-higher (Yu et al. 2025, eq. 10). dual_clip c > 1: with a negative advantage
    the loss is at most c |A| (Ye et al. 2020, section "Dual-clip PPO").
    """
    assert dual_clip is None or dual_clip > 1.0
    ratio = _exp(log_ratio)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


@torch.no_grad()
def policy_metrics(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Metrics:
    """Sums under the mask and its count; of the items without gradient, which side cut them off. All [...]."""
    ratio = _exp(log_ratio)
    dual = (advantages < 0) & (ratio > dual_clip) if dual_clip is not None else torch.zeros_like(mask)
    values = {
        "policy/ratio": ratio,
        "policy/clipped low": (advantages < 0) & (ratio < 1 - clip_low),
        "policy/clipped high": (advantages > 0) & (ratio > 1 + clip_high),
        "policy/dual clipped": dual,
        "policy/kl to old": kl_k3(-log_ratio),  # samples are the old policy's, so this is KL(old, new)
    }
    return {name: masked_sum(value.to(torch.float32), mask) for name, value in values.items()}


def sequence_log_ratio(
    log_ratio: torch.Tensor,
    mask: torch.Tensor,
    segments: torch.Tensor,
    num_segments: int,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """GSPO's log s: the mean log-ratio of each sequence's tokens (Zheng et al. 2025, eq. 7). [n]

    log_ratio, mask, segments: [s, b]. Its loss is clipped_policy_loss of one item a sequence; cp_group as segment_sums.
    """
    sums, tokens = segment_sums(log_ratio, mask, segments, num_segments, cp_group)
    return sums / tokens.clamp(min=1)


def gspo_token_log_ratio(log_ratio: torch.Tensor, of_sequence: torch.Tensor) -> torch.Tensor:
    """The sequence's ratio with the token's gradient (ibid., eq. 14), for advantages that differ by token.

    log_ratio: [s, b]. of_sequence: [s, b] sequence_log_ratio of each token's sequence, a constant.
    """
    return of_sequence.detach() + log_ratio - log_ratio.detach()


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float | None = 0.2
) -> torch.Tensor:
    """0.5 * max((v - R)^2, (v' - R)^2), v' = v at most `clip` from the old value. All [...]; clip None: plain.

    As in PPO's code (OpenAI Baselines), which no equation of the paper gives; some systems leave out the half.
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (near - returns).square())


def kl_k1(log_ratio: torch.Tensor) -> torch.Tensor:
    """d = log p - log reference; unbiased, of either sign (Schulman 2020, "Approximating KL divergence"). [...]

    Gradient in d: 1. As a loss its expected gradient is 0, whatever the reference: only for rewards and reports.
    """
    return log_ratio


def kl_k2(log_ratio: torch.Tensor) -> torch.Tensor:
    """d^2 / 2; biased, low variance. [...]

    Gradient in d: d. As a loss on the policy's own samples, its expected gradient is that of KL(policy, reference).
    """
    return 0.5 * log_ratio.square()


def kl_k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d; unbiased, never negative; GRPO's (Shao et al. 2024, eq. 4). [...]

    Gradient in d: 1 - exp(-d). As a loss on the policy's own samples, its expected gradient is that of
    KL(reference, policy), the other direction. d beyond +-20 is cut.
    """
    d = log_ratio.clamp(-_LARGEST, _LARGEST)
    return torch.expm1(-d) + d


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""Name -> estimator(log p - log reference) -> [...]."""


def entropy_bonus(entropy: torch.Tensor, *, coefficient: float) -> torch.Tensor:
    """-coefficient * entropy: what is added to the loss (Schulman et al. 2017, eq. 9). [...]"""
    return -coefficient * entropy


@torch.no_grad()
def truncated_importance_weights(
    log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, *, cap: float = 2.0
) -> torch.Tensor:
    """min(p / p of the sampler, cap): factors of the token's loss, constants. [...]

    Both of the same parameters: log_probs as the trainer computes them before the update, sampler_log_probs as the
    inference engine did, which differ by its arithmetic (Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training").
    """
    return _exp(log_probs - sampler_log_probs).clamp(max=cap)


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-_LARGEST, _LARGEST).exp()
