"""Rewards into advantages: constants of the policy's loss, so nothing here has a gradient.

Rows are one answer each, [b, s], in the order of tokens; whatever lies under the mask (prompts, tool output, padding)
may be anything. Legend: b answers, s tokens, g prompts, k answers to each prompt.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from scale_llm.parallel import collectives


@torch.no_grad()
def reward_on_last_token(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[b] rewards of answers -> [b, s], 0 but for the last trainable token. mask: [b, s], 1 where trainable.

    The last token of a row may be padding or a tool's, whose reward no advantage would see.
    """
    kept = mask.bool()
    last = kept & (kept.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last, rewards[:, None], 0)


@torch.no_grad()
def overlong_penalty(lengths: torch.Tensor, *, max_tokens: int, buffer_tokens: int) -> torch.Tensor:
    """What is added to an answer's reward: 0 until the buffer before max_tokens, then falling to -1 at max_tokens.

    lengths: [b] tokens of each answer (Yu et al. 2025, "DAPO", eq. 13).
    """
    assert 0 < buffer_tokens <= max_tokens
    return ((max_tokens - buffer_tokens - lengths) / buffer_tokens).clamp(-1, 0)


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns (Schulman et al. 2016, eq. 16). All [b, s].

    The next value and the next advantage are those of the next *trainable* token: time stands still under the mask,
    where both results are 0 and rewards count nothing. After the last one the value is 0. Returns = advantages +
    values, before any whitening.
    """
    kept = mask.bool()
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    values, rewards = torch.where(kept, values, zero), torch.where(kept, rewards, zero)
    following = _shifted(_from_the_end((~kept).to(values.dtype), values), 1)
    delta = torch.where(kept, rewards + gamma * following - values, zero)
    advantages = _from_the_end(torch.where(kept, gamma * lam, zero + 1), delta)
    return torch.where(kept, advantages, zero), torch.where(kept, advantages + values, zero)


@torch.no_grad()
def discounted_returns(rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0) -> torch.Tensor:
    """Rewards from each trainable token on, each later one times another gamma; 0 under the mask. All [b, s]."""
    kept = mask.bool()
    one = torch.ones((), dtype=rewards.dtype, device=rewards.device)
    totals = _from_the_end(torch.where(kept, gamma * one, one), torch.where(kept, rewards, 0))
    return torch.where(kept, totals, 0)


@torch.no_grad()
def reinforce_plus_plus(
    rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Returns, whitened over all ranks (Hu 2025, "REINFORCE++"). All [b, s].

    rewards: the answer's on its last token less the KL penalty of every token. For the variant with a baseline,
    subtract the group's mean from the answer's reward before (group_normalised with correction None).
    """
    return whiten(discounted_returns(rewards, mask, gamma=gamma), mask, group=group)


@torch.no_grad()
def group_normalised(rewards: torch.Tensor, *, correction: int | None = 1, epsilon: float = 1e-6) -> torch.Tensor:
    """Rewards less their group's mean, over its standard deviation + epsilon. [g, k]

    correction 1: the deviation divides by k - 1, as most systems' GRPO (Shao et al. 2024, section 4.1.2); 0: by k;
    None: no deviation, as Dr. GRPO (Liu et al. 2025). Equal rewards give 0.
    """
    centred = _centred(rewards)
    if correction is not None:
        centred = centred / (centred.std(-1, correction=correction, keepdim=True) + epsilon)
    return centred.to(rewards.dtype)


@torch.no_grad()
def rloo(rewards: torch.Tensor) -> torch.Tensor:
    """Each reward less the mean of its group's others (Kool et al. 2019; Ahmadian et al. 2024). [g, k], k > 1."""
    k = rewards.size(-1)
    assert k > 1, "leave-one-out needs two answers to a prompt"
    return (_centred(rewards) * (k / (k - 1))).to(rewards.dtype)


@torch.no_grad()
def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """(value - mean) / sqrt(variance + epsilon) under the mask, 0 elsewhere. values, mask: [...].

    group: the ranks that hold parts of the batch; mean and variance are the whole batch's. The variance divides by the
    count (TRL and verl: by the count - 1). shift_mean False adds the mean back. A rank with nothing under its mask
    calls it all the same.

    In FP64: equal values in FP32 give exactly 0, where the rounding of an FP32 mean, over a deviation of nearly 0,
    would be an advantage.
    """
    kept, dtype = mask.bool(), values.dtype
    values = torch.where(kept, values, 0).double()
    total, count = _over_ranks(torch.stack([values.sum(), kept.sum().to(values.dtype)]), group).unbind()
    mean = total / count.clamp(min=1)
    centred = torch.where(kept, values - mean, 0)  # two passes: E[x^2] - E[x]^2 loses what a large mean hides
    variance = _over_ranks(centred.square().sum(), group) / count.clamp(min=1)
    white = centred * torch.rsqrt(variance + epsilon)
    return (white if shift_mean else torch.where(kept, white + mean, 0)).to(dtype)


@dataclass
class AdaptiveKL:
    """A KL penalty's coefficient that follows a target (Ziegler et al. 2019, section 2.2).

    coefficient: now. target: the KL aimed at, nats an answer. horizon: samples after which a KL that is a fifth or
    more off has changed it by about a fifth.
    """

    coefficient: float
    target: float
    horizon: float

    def update(self, kl: float, samples: int) -> float:
        """kl: the mean over the last `samples` answers of the whole batch. Returns the new coefficient.

        More samples than the horizon count as many: five times as many would make the coefficient 0, and more negative.
        """
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * min(samples / self.horizon, 1.0)
        return self.coefficient


def _centred(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards less their group's mean, FP64. [g, k] -> [g, k]

    Exactly 0 where all are equal. In FP32 the mean of eight times 0.7 is not 0.7, and over a deviation of 0 + 1e-6 what
    is left of eight times 50.3 is an advantage of 7.6.
    """
    wide = rewards.double()
    wide = wide - wide[..., :1]
    return wide - wide.mean(-1, keepdim=True)


def _over_ranks(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None and group.size() > 1:
        collectives.all_reduce(x, group=group)
    return x


def _from_the_end(decay: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """x[t] = term[t] + decay[t] * x[t+1], x = 0 after the last. [b, s]

    By doubling: log2(s) passes where a loop over tokens would launch several kernels for each.
    """
    step = 1
    while step < term.size(-1):
        term = term + decay * _shifted(term, step)
        decay = decay * _shifted(decay, step)
        step *= 2
    return term


def _shifted(x: torch.Tensor, step: int) -> torch.Tensor:
    """x[t + step], 0 past the end."""
    return torch.nn.functional.pad(x[..., step:], (0, step))
