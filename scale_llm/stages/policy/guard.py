"""Watches for signs that a reward is being gamed."""

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


REMEDY = "look at transcripts.jsonl; raise the limit, stage.kl_coef or stage.kl_loss_coef, or lower optim.lr"


def stops(guard: GuardConfig, broken: list[str]) -> tuple[str, ...]:
    """Why the run is to end, if it is."""
    return tuple(f"{sentence}; {REMEDY}" for sentence in broken) if guard.action is GuardAction.stop else ()


def rate_factor(guard: GuardConfig, *, broken: bool, before: bool) -> float:
    """What the actor's learning rate is to be multiplied by. before: a limit was broken in the iteration before too."""
    return 0.5 if broken and not before and guard.action is GuardAction.lower_lr else 1.0
