"""One iteration of PPO, GRPO or GSPO in plain PyTorch, written from the papers' equations, to check the stages against.

One sequence at a time, without packing or padding; one token at a time where the papers write a sum over tokens.
Everything is FP64, so that of a difference the rounding is the run's alone.

    old log-probabilities at the temperature  ->  r_t = reward at the last token - kl_coef (log p_t - log ref_t)
    GAE (Schulman et al. 2016, eq. 16)        ->  A_t whitened over all tokens of the batch;  R_t = A_t + V_t before
    or groups (Shao et al. 2024, 4.1.2)       ->  A_t = (reward - group's mean) / group's deviation
    PPO eq. 7 with dual clip (Ye et al. 2020), GSPO eq. 5; entropy; k3 to the reference; clipped values
    divided by what the whole mini-batch counts; gradients clipped to norm 1; AdamW

Legend: t tokens of one answer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from support import oracle
from support.oracle import Weights

SHAPE = oracle.Shape(vocab_size=512)
"""The model that tests' runs have: support/runs.py."""


@dataclass(kw_only=True)
class Rules:
    """Of an iteration, under the papers' names. mini_batch: answers of a step. each: answers to a prompt."""

    each: int
    temperature: float
    gamma: float = 1.0
    lam: float = 0.95
    kl_in_reward: float = 0.0
    kl_in_loss: float = 0.0
    clip_low: float
    clip_high: float
    dual_clip: float | None
    clip_value: float = 0.2
    entropy: float = 0.0
    has_critic: bool
    of_sequences: bool = False
    epochs: int
    mini_batch: int
    lr: float
    critic_lr: float | None = None
    adam_eps: float


@dataclass
class Iteration:
    """Tables: one list of numbers for each answer. steps: of each role, {metrics, grad_norm, learning_rate}."""

    tables: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def model(tensors: dict[str, torch.Tensor], prefix: str = "") -> Weights:
    """A checkpoint's model by our names, FP64; with a head of one number where it has one."""
    mine = {
        key.removeprefix(prefix): tensor.double()
        for key, tensor in tensors.items()
        if key.startswith((prefix + "embedding.", prefix + "decoder.", prefix + "score."))
    }
    found = oracle.from_engine(mine, SHAPE)
    if "score.weight" in mine:
        found["score.weight"] = mine["score.weight"].clone().requires_grad_()
        found["score.bias"] = mine.get("score.bias", torch.zeros(1).double()).clone().requires_grad_()
    return found


def score(w: Weights, answer) -> float:
    """A reward model's: the head's number at the last token."""
    x, _ = oracle.hidden_states(w, torch.tensor([answer["prompt"] + answer["tokens"]]), SHAPE)
    return float(x[0, -1] @ w["score.weight"][0] + w["score.bias"])


def spoken(w: Weights, answer, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the answer's tokens and the entropy of what they are drawn from, [t] each.

    The logits at a token speak of the one that follows it.
    """
    tokens, first = answer["prompt"] + answer["tokens"], len(answer["prompt"])
    logits, _ = oracle.logits(w, torch.tensor([tokens]), SHAPE)
    log_p = (logits[0] / temperature).log_softmax(-1)
    chosen = torch.stack([log_p[place - 1, tokens[place]] for place in range(first, len(tokens))])
    entropy = torch.stack([-(log_p[p - 1].exp() * log_p[p - 1]).sum() for p in range(first, len(tokens))])
    return chosen, entropy


def valued(w: Weights, answer) -> torch.Tensor:
    """[t] what the critic expects before each token: of the sequence up to the one before. No temperature."""
    first, count = len(answer["prompt"]), len(answer["tokens"])
    x, _ = oracle.hidden_states(w, torch.tensor([answer["prompt"] + answer["tokens"]]), SHAPE)
    return x[0, first - 1 : first - 1 + count] @ w["score.weight"][0] + w["score.bias"]


def iterate(rules: Rules, answers, scores: list[float], actor: Weights, critic: Weights | None, reference) -> Iteration:
    """The weights of actor and critic are updated in place."""
    found = Iteration()
    tables = found.tables
    with torch.no_grad():
        tables["old_log_probs"] = [spoken(actor, answer, rules.temperature)[0] for answer in answers]
        if reference is not None:
            tables["reference_log_probs"] = [spoken(reference, answer, rules.temperature)[0] for answer in answers]
        if critic is not None:
            tables["old_values"] = [valued(critic, answer) for answer in answers]
        _estimate(rules, tables, scores)
    if critic is not None:
        loss = lambda numbers: _value_loss(rules, critic, answers, tables, numbers)  # noqa: E731
        lr = rules.lr if rules.critic_lr is None else rules.critic_lr
        found.steps["critic"] = list(_steps(rules, critic, lr, len(answers), loss))
    loss = lambda numbers: _policy_loss(rules, actor, answers, tables, numbers)  # noqa: E731
    found.steps["actor"] = list(_steps(rules, actor, rules.lr, len(answers), loss))
    return found


def _estimate(rules: Rules, tables, scores: list[float]) -> None:
    """Advantages, and returns where there is a critic."""
    count = len(scores)
    if not rules.has_critic:
        tables["advantages"] = []
        for number in range(count):
            first = number - number % rules.each
            group = scores[first : first + rules.each]
            mean = sum(group) / len(group)
            deviation = math.sqrt(sum((s - mean) ** 2 for s in group) / (len(group) - 1))
            advantage = (scores[number] - mean) / (deviation + 1e-6)
            tables["advantages"].append(torch.full_like(tables["old_log_probs"][number], advantage))
        return
    plain, tables["returns"] = [], []
    for number in range(count):
        old, values = tables["old_log_probs"][number].tolist(), tables["old_values"][number].tolist()
        rewards = [0.0] * len(old)
        rewards[-1] = scores[number]
        if rules.kl_in_reward:
            reference = tables["reference_log_probs"][number].tolist()
            rewards = [r - rules.kl_in_reward * (p - q) for r, p, q in zip(rewards, old, reference, strict=True)]
        advantages, following, carried = [0.0] * len(old), 0.0, 0.0
        for t in reversed(range(len(old))):
            delta = rewards[t] + rules.gamma * following - values[t]
            advantages[t] = carried = delta + rules.gamma * rules.lam * carried
            following = values[t]
        plain.append(advantages)
        tables["returns"].append(torch.tensor([a + v for a, v in zip(advantages, values, strict=True)]).double())
    every = [a for advantages in plain for a in advantages]
    mean = sum(every) / len(every)
    variance = sum((a - mean) ** 2 for a in every) / len(every)
    tables["advantages"] = [torch.tensor([(a - mean) / math.sqrt(variance + 1e-8) for a in x]).double() for x in plain]


def _policy_loss(rules: Rules, actor: Weights, answers, tables, numbers: list[int]):
    """(loss, metrics) of a mini-batch."""
    policy, kl, entropies, ratios, clipped, dual, apart = [], [], [], [], 0, 0, []
    for number in numbers:
        log_probs, entropy = spoken(actor, answers[number], rules.temperature)
        old, advantages = tables["old_log_probs"][number], tables["advantages"][number].tolist()
        count = len(advantages)
        if rules.of_sequences:
            one = ((log_probs - old).sum() / count).exp()  # eq. 7
            tokens = [one] * count
        else:
            tokens = list((log_probs - old).exp())
        losses = []
        for ratio, advantage in zip(tokens, advantages, strict=True):
            within = min(max(float(ratio), 1 - rules.clip_low), 1 + rules.clip_high)
            loss = -ratio * advantage
            if within * advantage < float(ratio) * advantage:
                loss, clipped = torch.tensor(-within * advantage), clipped + 1
            if rules.dual_clip and advantage < 0 and float(ratio) > rules.dual_clip:
                loss, dual = torch.tensor(-rules.dual_clip * advantage), dual + 1
            losses.append(loss)
        policy.append(torch.stack(losses))
        ratios += [float(ratio) for ratio in tokens]
        apart += (old - log_probs).tolist()
        entropies.append(entropy)
        if rules.kl_in_loss:
            d = log_probs - tables["reference_log_probs"][number]
            kl.append((-d).exp() - 1 + d)
    if rules.of_sequences:
        mean = lambda parts: torch.stack([part.mean() for part in parts]).mean()  # noqa: E731
    else:
        mean = lambda parts: torch.cat(parts).mean()  # noqa: E731
    metrics = {"pg_loss": float(mean(policy)), "entropy": float(torch.cat(entropies).mean()),
               "ratio": sum(ratios) / len(ratios), "ppo_kl": sum(apart) / len(apart),
               "pg_clipfrac": clipped / len(ratios), "pg_clipfrac_lower": dual / len(ratios)}  # fmt: skip
    loss = mean(policy) - rules.entropy * mean(entropies)
    if rules.kl_in_loss:
        loss = loss + rules.kl_in_loss * mean(kl)
        metrics["kl_loss"] = float(mean(kl))
    return loss, metrics


def _value_loss(rules: Rules, critic: Weights, answers, tables, numbers: list[int]):
    """0.5 max((v - R)^2, (v' - R)^2), v' within clip_value of the old value."""
    losses, clipped = [], 0
    for number in numbers:
        values, old, returns = valued(critic, answers[number]), tables["old_values"][number], tables["returns"][number]
        for v, o, r in zip(values, old, returns, strict=True):
            near = o + (v - o).clamp(-rules.clip_value, rules.clip_value)
            losses.append(0.5 * torch.maximum((v - r) ** 2, (near - r) ** 2))
            clipped += int(abs(v - o) > rules.clip_value and abs(near - r) > abs(v - r))
    loss = torch.stack(losses).mean()
    return loss, {"vf_loss": float(loss), "vf_clipfrac": clipped / len(losses)}


def _steps(rules: Rules, w: Weights, lr: float, count: int, loss_of) -> Iterator[dict[str, Any]]:
    """AdamW (0.9, 0.95, decay 0.01 for matrices), norm 1, the rate falling in a straight line over the iteration."""
    groups = [{"params": [x for x in w.values() if (x.dim() > 1) is matrix], "weight_decay": 0.01 * matrix}
              for matrix in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=rules.adam_eps)
    firsts = [first for _ in range(rules.epochs) for first in range(0, count, rules.mini_batch)]
    for number, first in enumerate(firsts):
        optimizer.zero_grad()
        loss, metrics = loss_of(list(range(first, first + rules.mini_batch)))
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0))
        rate = lr * (1 - number / len(firsts))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        yield {"metrics": metrics, "grad_norm": norm, "learning_rate": rate}
