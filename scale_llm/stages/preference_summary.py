"""What an evaluation on pairs of answers says: means, and how far a small sample may be from the truth."""

from scale_llm.stages.base import Evaluation
from scale_llm.stages.interval import beside_chance, wilson_interval
from scale_llm.stages.sequence_stage import Totals, means

ACCURACY = "rewards/accuracies"


def pair_summary(totals: Totals) -> Evaluation:
    """Means over pairs; of the accuracy also the 95% interval, and in words whether it excludes chance."""
    right, count = totals[ACCURACY]
    low, high = wilson_interval(right, count)
    interval = {f"{ACCURACY} validation 95% low": low, f"{ACCURACY} validation 95% high": high}
    return Evaluation({**means(totals), **interval}, remarks=[beside_chance(right, count)])
