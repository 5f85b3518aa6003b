"""From scores of answers to advantages of their tokens. Pure, on tables that every rank has.

Legend: n answers, t tokens of the longest, g prompts, k answers to each.
"""

from dataclasses import dataclass

import torch

from scale_llm.config.policy import AdvEstimator, LossAggregation, PolicyStageConfig
from scale_llm.losses.advantages import (
    discounted_returns,
    gae,
    group_normalised,
    overlong_penalty,
    reinforce_plus_plus,
    reward_on_last_token,
    rloo,
    whiten,
)
from scale_llm.losses.policy import kl_k1


@dataclass(frozen=True, slots=True)
class Estimate:
    """All [n, t]. rewards: of each token, KL taken off. returns: what the critic is to predict."""

    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def estimate(
    stage: PolicyStageConfig, scores: torch.Tensor, mask: torch.Tensor, log_probs: torch.Tensor, *,
    reference: torch.Tensor | None, values: torch.Tensor | None, kl_coef: float,
) -> Estimate:  # fmt: skip
    """scores: [n]. mask: bool [n, t]; log_probs, reference, values: [n, t] before the update; reference and values
    where the stage has them."""
    rewards = reward_on_last_token(scores, mask)
    if reference is not None and kl_coef:
        rewards = rewards - torch.where(mask, kl_coef * kl_k1(log_probs - reference), 0)
    if stage.adv_estimator is AdvEstimator.gae:
        advantages, returns = gae(rewards, values, mask, gamma=stage.gamma, lam=stage.lam)
        if stage.whiten_advantages:
            advantages = whiten(advantages, mask)
        return Estimate(rewards, advantages, returns)
    returns = discounted_returns(rewards, mask, gamma=stage.gamma)
    return Estimate(rewards, _advantages(stage, rewards, mask), returns)


def _advantages(stage: PolicyStageConfig, rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the estimators without a critic."""
    estimator = stage.adv_estimator
    if estimator is AdvEstimator.reinforce_plus_plus:
        return reinforce_plus_plus(rewards, mask, gamma=stage.gamma)
    groups = rewards.sum(-1).view(-1, stage.num_generations_per_prompt)
    if estimator is AdvEstimator.reinforce_plus_plus_baseline:
        centred = group_normalised(groups, correction=None)  # exactly 0 where all are equal: whitening would magnify
        return reinforce_plus_plus(
            rewards + reward_on_last_token((centred - groups).reshape(-1), mask), mask, gamma=stage.gamma
        )  # fmt: skip
    if estimator is AdvEstimator.rloo:
        found = rloo(groups)
    else:
        found = group_normalised(groups, correction=1 if stage.norm_adv_by_std_in_grpo else None)
    return torch.where(mask, found.reshape(-1, 1), 0)


def with_length(stage: PolicyStageConfig, scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Scores [n] less DAPO's penalty for answers [n] that come near the limit."""
    if not stage.overlong_buffer_tokens:
        return scores
    penalty = overlong_penalty(
        lengths, max_tokens=stage.max_new_tokens, buffer_tokens=stage.overlong_buffer_tokens
    )  # fmt: skip
    return scores + stage.overlong_penalty_factor * penalty


def token_weights(stage: PolicyStageConfig, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What every token's loss is multiplied by, and its share in what the sum is divided by; both [n, t]."""
    tokens = mask.to(torch.float32)
    of_answer = tokens / tokens.sum(-1, keepdim=True).clamp(min=1)
    if stage.loss_agg_mode is LossAggregation.token_mean:
        return tokens, tokens
    if stage.loss_agg_mode is LossAggregation.seq_mean_token_mean:
        return of_answer, of_answer
    return tokens / stage.max_new_tokens, of_answer


def groups_without_signal(scores: torch.Tensor, each: int) -> torch.Tensor:
    """bool [g], where all answers to a prompt have one score. scores: [n]."""
    groups = scores.view(-1, each)
    return (groups == groups[:, :1]).all(-1)
