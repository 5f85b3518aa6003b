"""Direct preference optimisation: pairs per second and peak memory, the reference cached and live, against transformers
in a loop that computes what TRL does."""

import argparse
import math
import tempfile
from pathlib import Path

from benchmarks.alternate import Contestant, alternate
from benchmarks.dpo_contestants import MICRO_BATCH, PAIRS, SETS, prepare
from benchmarks.rows import Row, faster, shorter
from scale_llm.config.machine import detect

HELP = "pairs per second of DPO and its peak memory, reference cached and live, against transformers as TRL runs it"
EXAMPLES = """examples:
  python tools/benchmark.py dpo --out dpo.json
"""
_BUILDERS = "benchmarks.dpo_contestants"
_TOLERANCE = {"bf16": (5e-3, 2e-2), "fp32": (1e-4, 1e-3)}
"""Of the first loss to ln 2, and of a contestant's second to another's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contestant (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the alternation (default: 5; medians of them)")


def run(arguments: argparse.Namespace) -> list[Row]:
    """All contestants train on the same pairs from the same weights, SETS steps a round."""
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        contestants = _contestants(directory, arguments.precision)
        alternate(contestants, rounds=max(5, arguments.rounds), threads=arguments.threads)
    for each in contestants:
        print(f"{each.name}: first losses {', '.join(f'{loss:.4f}' for loss in each.losses)}")
    _check_losses(contestants, *_TOLERANCE[arguments.precision])
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
    def contestant(name: str, function: str, **extra) -> Contestant:
        arguments = {"directory": directory, "precision": precision, **extra}
        return Contestant(name=name, build=f"{_BUILDERS}:{function}", arguments=arguments, steps=SETS)

    compiled = bool(detect().compiler)
    return [
        contestant("ours cached", "ours", reference="cached", compiled=compiled),
        contestant("ours live", "ours", reference="copy", compiled=compiled),
        contestant("precomputed", "transformers_pairs", live=False),
        contestant("live", "transformers_pairs", live=True),
    ]


def _check_losses(contestants: list[Contestant], to_start: float, to_others: float) -> None:
    """All must compute the same: ln 2 at first, then on the same pairs what the same update made of it."""
    for each in contestants:
        if abs(each.losses[0] - math.log(2)) > to_start:
            raise RuntimeError(f"{each.name}: its first loss is {each.losses[0]:.5f}, not ln 2")
    second = {each.name: each.losses[1] for each in contestants}
    if max(second.values()) - min(second.values()) > to_others:
        raise RuntimeError(f"the contestants' second losses differ by more than {to_others}: {second}")
