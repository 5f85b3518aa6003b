"""Fine-tuning on GSM8K's real lengths: tokens per second, padding apart; packed, padded, and by transformers."""

import argparse
import tempfile
from pathlib import Path

from benchmarks.alternate import Contestant, alternate, common_arguments, contestants_of
from benchmarks.rows import Row, faster
from benchmarks.sft_contestants import MICRO_BATCH, SETS, prepare

HELP = "useful tokens per second of fine-tuning, packed and padded, against transformers with padding"
EXAMPLES = """examples:
  python tools/benchmark.py sft --data gsm8k_train.jsonl --out sft.json
"""
_BUILDERS = "benchmarks.sft_contestants"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"{name}: no such file; give GSM8K as JSONL, fields question and answer")
    return Path(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=_file, default=str(DATA), help="GSM8K as JSONL, fields question and answer")
    common_arguments(parser, rounds=7)


def run(arguments: argparse.Namespace) -> list[Row]:
    """All contestants train on the same conversations, SETS steps a round."""
    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare(arguments.data, Path(directory))
        contestants = _contestants(str(Path(directory)), arguments.precision)
        alternate(contestants, rounds=max(5, arguments.rounds), threads=arguments.threads)
    rate = {c.name: prepared["tokens"] / SETS / c.median_seconds for c in contestants}
    what = f"{arguments.precision}, {prepared['conversations'] // SETS} conversations a step"
    rows = [
        faster(f"packed, {what}", rate["ours packed"], rate[name], kind, "useful tokens/s")
        for name, kind in {
            "transformers": f"transformers, padded to the longest of {MICRO_BATCH}",
            "ours padded": f"ours, padded to the longest of {MICRO_BATCH}",
            "ours by budget": "ours, dealt out by tokens",
        }.items()
    ]
    rows.append(
        faster(f"padded, {what}", rate["ours padded"], rate["transformers"], "transformers, padded", "tokens/s")
    )
    filled = prepared["filled"]
    rows.append(faster("places that hold a token", filled["packed"], filled["padded"], "padded", ""))
    return rows


def _contestants(directory: str, precision: str) -> list[Contestant]:
    return contestants_of(
        _BUILDERS, SETS, {"directory": directory, "precision": precision},
        {
            "ours packed": ("ours", {"batching": "packed"}),
            "ours padded": ("ours", {"batching": "padded"}),
            "ours by budget": ("ours", {"batching": "token_budget"}),
            "transformers": ("transformers_padded", {}),
        },
    )  # fmt: skip
