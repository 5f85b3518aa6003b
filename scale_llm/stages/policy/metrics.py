"""Numbers of an iteration's tables, under the names that verl gives them."""

import torch

from scale_llm.stages.policy.answers import Answers
from scale_llm.stages.policy.estimate import Estimate


def table_metrics(
    answers: Answers, mask: torch.Tensor, scores: torch.Tensor, found: Estimate, tables: dict[str, torch.Tensor]
) -> dict[str, float]:
    """mask: bool [n, t]. scores: [n]. tables: [n, t], `old_log_probs`, `sampled_log_probs`, and `reference_log_probs`
    and `old_values` where the stage has them."""
    lengths = torch.from_numpy(answers.answer_lengths).float()
    cut = torch.tensor([float(not completion.finished) for completion in answers.completions])
    summed = {
        "score": scores,
        "rewards": torch.where(mask, found.rewards, 0).sum(-1),
        "advantages": found.advantages[mask],
        "returns": found.returns[mask],
    }
    if "old_values" in tables:
        values, returns = tables["old_values"][mask].double(), found.returns[mask].double()
        summed["values"] = values
    metrics = {
        f"critic/{name}/{kind}": float(getattr(value.double(), kind)())
        for name, value in summed.items()
        for kind in ("mean", "max", "min")
    }
    if "old_values" in tables:
        spread = float(returns.var(unbiased=False))
        metrics["critic/vf_explained_var"] = 1 - float((returns - values).var(unbiased=False)) / (spread or 1.0)
    metrics |= {f"response_length/{kind}": float(getattr(lengths, kind)()) for kind in ("mean", "max", "min")}
    metrics["response_length/clip_ratio"] = float(cut.mean())
    apart = (tables["old_log_probs"] - tables["sampled_log_probs"])[mask].double()
    metrics["rollout/log_prob_diff/mean"] = float(apart.abs().mean())
    metrics["rollout/log_prob_diff/max"] = float(apart.abs().max())
    if "reference_log_probs" in tables:
        metrics["actor/reference_kl"] = mean_kl(mask, tables)
    return metrics


def mean_kl(mask: torch.Tensor, tables: dict[str, torch.Tensor]) -> float:
    """KL of the policy before the update to the reference, k1, nats a token."""
    return float((tables["old_log_probs"] - tables["reference_log_probs"])[mask].double().mean())
