"""Direct preference optimisation: pairs per second and peak memory, the reference cached and live, against transformers
in a loop that computes what TRL does."""

import argparse
import math
import tempfile
from pathlib import Path

from benchmarks.alternate import Contestant, alternate, common_arguments, contestants_of
from benchmarks.dpo_contestants import MICRO_BATCH, PAIRS, SETS, prepare
from benchmarks.rows import Row, faster, shorter

HELP = "pairs per second of DPO and its peak memory, reference cached and live, against transformers as TRL runs it"
EXAMPLES = """examples:
  python tools/benchmark.py dpo --out dpo.json
"""
_BUILDERS = "benchmarks.dpo_contestants"
_TOLERANCE = {"bf16": (5e-3, 0.05, None), "fp32": (1e-4, 1e-3, 1e-3)}
"""Of the first loss to ln 2; of the first gradient's norm and of the second loss to others', relative. Second losses in
BF16 are not compared: an update of 1e-5 is below the spacing of BF16 weights, and who rounds which weights differs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser, rounds=5)


def run(arguments: argparse.Namespace) -> list[Row]:
    """All contestants train on the same pairs from the same weights, SETS steps a round."""
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        contestants = _contestants(directory, arguments.precision)
        alternate(contestants, rounds=max(5, arguments.rounds), threads=arguments.threads)
    for each in contestants:
        losses = ", ".join(f"{facts['loss']:.4f}" for facts in each.facts)
        print(f"{each.name}: losses {losses}; gradient norm {each.facts[0]['grad_norm']:.4f}")
    _check(contestants, *_TOLERANCE[arguments.precision])
    rate = {each.name: PAIRS / each.median_seconds for each in contestants}
    peak = {each.name: each.peak_gib for each in contestants}
    what = f"{arguments.precision}, {PAIRS} pairs a step"
    precomputed, live = (
        f"transformers, padded to the longest of {2 * MICRO_BATCH}, {kind}"
        for kind in ("precomputed", "live reference")
    )
    return [
        faster(f"cached reference, {what}", rate["ours cached"], rate["precomputed"], precomputed, "pairs/s"),
        faster(f"live reference, {what}", rate["ours live"], rate["live"], live, "pairs/s"),
        faster(f"cached reference, {what}", rate["ours cached"], rate["live"], live, "pairs/s"),
        shorter(f"peak memory, cached reference, {what}", peak["ours cached"], peak["live"], live, "GiB"),
        shorter(f"peak memory, live reference, {what}", peak["ours live"], peak["live"], live, "GiB"),
    ]


def _contestants(directory: str, precision: str) -> list[Contestant]:
    return contestants_of(
        _BUILDERS, SETS, {"directory": directory, "precision": precision},
        {
            "ours cached": ("ours", {"reference": "cached"}),
            "ours live": ("ours", {"reference": "copy"}),
            "precomputed": ("transformers_pairs", {"live": False}),
            "live": ("transformers_pairs", {"live": True}),
        },
    )  # fmt: skip


def _check(contestants: list[Contestant], to_start: float, of_norms: float, of_losses: float | None) -> None:
    """All must compute the same: ln 2 at first, one gradient, and on the same pairs after one update a lower loss."""
    for each in contestants:
        first, second = (facts["loss"] for facts in each.facts[:2])
        if abs(first - math.log(2)) > to_start or second >= first:
            raise RuntimeError(f"{each.name}: its losses begin {first:.5f}, {second:.5f}, not with ln 2 and less")
    compared = [("gradient norms", 0, "grad_norm", of_norms)]
    if of_losses is not None:
        compared.append(("second losses", 1, "loss", of_losses))
    for what, place, key, tolerance in compared:
        values = {each.name: each.facts[place][key] for each in contestants}
        if max(values.values()) > (1 + tolerance) * min(values.values()):
            raise RuntimeError(f"the contestants' {what} differ by more than {tolerance:.1%}: {values}")
