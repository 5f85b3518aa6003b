"""What an evaluation on answers says: means, how far a small sample may be from the truth, how sure a model may be."""

from scale_llm.losses.reward import CALIBRATION
from scale_llm.stages.base import Evaluation
from scale_llm.stages.interval import beside_chance, wilson_interval
from scale_llm.stages.sequence_stage import Totals, means

ACCURACY = "rewards/accuracies"


def pair_summary(totals: Totals, what: str = "held-out pairs in the right order") -> Evaluation:
    """Means over pairs; of the accuracy also the 95% interval, and in words whether it excludes chance."""
    right, count = totals[ACCURACY]
    low, high = wilson_interval(right, count)
    interval = {f"{ACCURACY} validation 95% low": low, f"{ACCURACY} validation 95% high": high}
    return Evaluation({**means(totals), **interval}, remarks=[beside_chance(right, count, what)])


def answer_summary(totals: Totals) -> Evaluation:
    """The same of single answers, and the margin between the means of both kinds."""
    found = pair_summary(totals, "held-out answers judged right")
    chosen, rejected = (found.metrics[f"rewards/{kind} validation"] for kind in ("chosen", "rejected"))
    found.metrics["rewards/margins validation"] = chosen - rejected
    return found


def calibrated_summary(totals: Totals) -> Evaluation:
    """The same as pair_summary, and whether the model is right as often as its probabilities say.

    `rewards/calibration error`: the expected calibration error of Guo et al. 2017 (eq. 3); 0 is best. As a text also a
    row for each part of the probabilities.
    """
    bins = {name: value for name, value in totals.items() if name.startswith(CALIBRATION)}
    found = pair_summary({name: value for name, value in totals.items() if name not in bins})
    rows, error, pairs = [], 0.0, 0.0
    for part in range(len(bins) // 2):
        sure, count = bins[f"{CALIBRATION}{part}/confidence"]
        right, _ = bins[f"{CALIBRATION}{part}/accuracy"]
        if count:
            rows.append(f"| {sure / count:.3f} | {right / count:.3f} | {count:.0f} |")
            error, pairs = error + abs(sure - right), pairs + count
    found.metrics["rewards/calibration error validation"] = error / (pairs or 1.0)
    table = "\n".join(["| probability given | share right | pairs |", "|---|---|---|", *rows])
    return Evaluation(found.metrics, {"calibration": table}, found.remarks)
