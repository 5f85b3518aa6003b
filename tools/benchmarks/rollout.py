"""New tokens per second, against transformers' generate on the same weights, at most 32 samples at once."""

import argparse
import importlib.util
import tempfile
from pathlib import Path

from benchmarks.alternate import Contestant, alternate, common_arguments, contestants_of
from benchmarks.rollout_contestants import BATCH, WORKLOADS, prepare
from benchmarks.rows import Row, faster

HELP = "new tokens per second of sampling, against transformers' generate"
EXAMPLES = """examples:
  python tools/benchmark.py rollout --out rollout.json
  python tools/benchmark.py rollout --out rollout.json --precision bf16 --threads 1
"""
_BUILDERS = "benchmarks.rollout_contestants"
_NAMES = {
    "stop": "samples end at a stop token",
    "length": f"one batch of {BATCH}, all samples equally long",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser, rounds=5, precisions=("both", "bf16", "fp32"))


def run(arguments: argparse.Namespace) -> list[Row]:
    """All rows. Each precision and workload is one alternation of two contestants."""
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("transformers is not installed: pip install -c constraints.txt transformers")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        for precision in ["bf16", "fp32"] if arguments.precision == "both" else [arguments.precision]:
            for workload in WORKLOADS:
                contestants = _contestants(directory, precision, workload)
                alternate(contestants, rounds=max(5, arguments.rounds), threads=arguments.threads)
                ours, peer = (contestant.median_rate for contestant in contestants)
                measure = f"{precision}, {_NAMES[workload]}"
                rows.append(faster(measure, ours, peer, "transformers generate, sdpa", "new tokens/s"))
    return rows


def _contestants(directory: str, precision: str, workload: str) -> list[Contestant]:
    shared = {"directory": directory, "precision": precision, "workload": workload}
    names = {"ours": ("ours", {}), "transformers": ("transformers_generate", {})}
    return contestants_of(_BUILDERS, 1, shared, names)
