"""Collectives of ranks on one machine's CPUs: through shared memory, as layers and losses ask for them, beside gloo.

The same tensors on the same ranks in turns; seconds of one operation, of which many follow each other without a pause.
Medians of rounds, on the slowest rank.
"""

import argparse
from statistics import median

from benchmarks.ranks import on_ranks
from benchmarks.rows import Row, shorter

HELP = "sums, gathers and scattered sums of ranks on CPUs, through shared memory beside gloo"
EXAMPLES = """examples:
  python tools/benchmark.py collectives --out collectives.json
  python tools/benchmark.py collectives --out collectives.json --ranks 4 --rounds 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the alternation (default: 9; medians of them)")


def run(arguments: argparse.Namespace) -> list[Row]:
    """A row for every operation and size."""
    found = on_ranks("benchmarks.collectives_rank", arguments.ranks, {"rounds": arguments.rounds})
    return [
        shorter(
            f"{name}, {arguments.ranks} ranks", 1e6 * median(times["ours"]), 1e6 * median(times["gloo"]), "gloo", "us"
        )
        for name, times in found.items()
    ]  # fmt: skip
