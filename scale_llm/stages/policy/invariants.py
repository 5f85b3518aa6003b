"""What must hold before a policy has learnt anything; if it does not, the run would learn from wrong numbers."""

import torch

from scale_llm.config.precision import PrecisionConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import StageConfig
from scale_llm.losses.policy import kl_k3
from scale_llm.stages.policy.metrics import mean_kl


class BrokenInvariant(RuntimeError):
    """A fault of the program or of what lies under it, not of the user's words."""


ROLE_OF = {"old_log_probs": "actor", "reference_log_probs": "reference", "old_values": "critic"}


def without_numbers(tables: dict[str, torch.Tensor], scores: torch.Tensor) -> str | None:
    """Which roles have given numbers that are none; the same on all ranks, as the tables are."""
    bad = [role for name, role in ROLE_OF.items() if name in tables and not tables[name].isfinite().all()]
    bad += [] if scores.isfinite().all() else ["reward"]
    return f"{' and '.join(bad)}: numbers that are none (nan or infinite) for answers" if bad else None


def limit_of(precision: PrecisionConfig) -> float:
    """Nats a token that rounding explains: the same weights, other rows or another layout."""
    return 1e-2 if precision.bf16 or precision.fp16 else 1e-6


def check_reference(cfg: RunConfig, mask: torch.Tensor, tables: dict[str, torch.Tensor]) -> None:
    """The policy that has not moved is the reference: on average (k1) and at every token (k3, which is never negative:
    numbers of other tokens may have the same mean).

    Raises:
        BrokenInvariant: it is not.
    """
    if "reference_log_probs" not in tables or _moved(cfg.stage, cfg):
        return
    kl, limit = mean_kl(mask, tables), limit_of(cfg.precision)
    k3 = float(kl_k3((tables["old_log_probs"] - tables["reference_log_probs"])[mask].double()).mean())
    if abs(kl) > limit or k3 > limit:
        raise BrokenInvariant(
            f"before the first update the KL of the actor to the reference is {kl:.3g} nats a token, by k3 {k3:.3g}, "
            f"where it must be 0 (within {limit:g}): they are not the same model, or their numbers are of other tokens"
        )


def check_first_ratio(cfg: RunConfig, metrics: dict[str, float]) -> None:
    """In an iteration's first step the policy is the one that the old log-probabilities are of.

    Raises:
        BrokenInvariant: it is not.
    """
    kl, limit = metrics["actor/ppo_kl"], limit_of(cfg.precision)
    if abs(kl) > limit or abs(metrics["actor/ratio"] - 1) > limit:
        raise BrokenInvariant(
            f"in the first step of an iteration the ratio of new to old policy is {metrics['actor/ratio']:.9g}, the KL "
            f"{kl:.3g}: they must be 1 and 0 (within {limit:g})"
        )


def _moved(stage: StageConfig, cfg: RunConfig) -> bool:
    """Whether the reference is another checkpoint than the one that the actor starts from."""
    return getattr(stage, "reference_load", None) not in (None, cfg.checkpoint.load)
