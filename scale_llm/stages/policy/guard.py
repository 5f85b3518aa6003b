"""Watches for signs that a reward is being gamed."""

from scale_llm.config.errors import UserError
from scale_llm.config.policy import GuardAction, GuardConfig

LIMITS = {
    "max_kl": ("actor/reference_kl", 1, "the policy has moved far from the reference"),
    "min_entropy": ("actor/entropy", -1, "the policy says the same again and again"),
    "max_response_tokens": ("response_length/mean", 1, "answers have grown long"),
}
"""Key -> (metric, 1 for a highest value and -1 for a lowest, what it means)."""


def broken_limits(guard: GuardConfig, metrics: dict[str, float]) -> list[str]:
    """A sentence for every limit that the metrics of an iteration are beyond."""
    found = []
    for key, (name, sign, meaning) in LIMITS.items():
        limit = getattr(guard, key)
        if limit is not None and name in metrics and sign * metrics[name] > sign * limit:
            found.append(f"guard: {name} {metrics[name]:.4g} is beyond stage.guard.{key}={limit}: {meaning}")
    return found


def act(guard: GuardConfig, broken: list[str]) -> float:
    """What the actor's learning rate is to be multiplied by.

    Raises:
        UserError: the run is to stop.
    """
    if broken and guard.action is GuardAction.stop:
        remedy = "look at transcripts.jsonl; raise the limit, stage.kl_coef or stage.kl_loss_coef, or lower optim.lr"
        raise UserError([f"{sentence}; {remedy}" for sentence in broken])
    return 0.5 if broken and guard.action is GuardAction.lower_lr else 1.0
