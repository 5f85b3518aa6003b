"""Training speed of one shape against a bare megatron-core loop and Hugging Face transformers, and start-up times."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.alternate import Contestant, alternate, common_arguments
from benchmarks.rows import Row, faster, shorter
from benchmarks.train_contestants import MATMUL_SIZE, TOKENS, shape
from scale_llm.config.machine import detect
from scale_llm.config.parameters import flops_per_token

HELP = "tokens per second of a training step, against megatron-core's own layers and transformers"
EXAMPLES = """examples:
  python tools/benchmark.py train --out train.json
  python tools/benchmark.py train --out train.json --quick --precision bf16
"""
_BUILDERS = "benchmarks.train_contestants"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common_arguments(parser, rounds=7, precisions=("both", "bf16", "fp32"))
    parser.add_argument("--quick", action="store_true", help="5 rounds, one step each, nothing compiled")


def run(arguments: argparse.Namespace) -> list[Row]:
    """All rows. Each precision is one alternation, so that memory holds one set of models."""
    rounds = 5 if arguments.quick else max(5, arguments.rounds)
    precisions = ["bf16", "fp32"] if arguments.precision == "both" else [arguments.precision]
    rows: list[Row] = []
    for precision in precisions:
        contestants = _contestants(precision, arguments.quick)
        alternate(contestants, rounds=rounds, threads=arguments.threads)
        rows += _rows(precision, {c.name: c.median_seconds for c in contestants})
    return rows + [_loop_row(arguments.threads), *_start_up_rows(rounds=5)]


def _contestants(precision: str, quick: bool) -> list[Contestant]:
    steps = 1 if quick else {"bf16": 4, "fp32": 2}[precision]

    def contestant(name, function, **extra):
        arguments = {"precision": precision, **extra}
        return Contestant(name=name, build=f"{_BUILDERS}:{function}", arguments=arguments, steps=steps)

    compiler = detect().compiler and not quick
    found = [contestant("ours", "ours", compiled=compiler), contestant("megatron-core", "bare_megatron")]
    if compiler:
        found.append(contestant("ours, nothing compiled", "ours"))
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed (pip install -c constraints.txt transformers): its rows are left out")
    else:
        found.append(contestant("transformers", "transformers_llama"))
        if compiler and precision == "bf16":
            found.append(contestant("transformers compiled", "transformers_llama", compiled=True))
    matmul = contestant("matmul", "matmul")
    matmul.steps = {"bf16": 10, "fp32": 2}[precision]
    return [*found, matmul]


def _rows(precision: str, seconds: dict[str, float]) -> list[Row]:
    ours = TOKENS / seconds["ours"]
    kinds = {
        "ours, nothing compiled": "ours, nothing compiled",
        "megatron-core": "megatron-core, local spec",
        "transformers": "transformers, eager",
        "transformers compiled": "transformers, torch.compile",
    }
    rows = [
        faster(f"training step, {precision}", ours, TOKENS / seconds[name], kind, "tokens/s")
        for name, kind in kinds.items()
        if name in seconds
    ]
    peak = 2 * MATMUL_SIZE**3 / seconds["matmul"] / 1e9
    model = ours * flops_per_token(shape()) / 1e9
    name = f"{precision} product of {MATMUL_SIZE} x {MATMUL_SIZE} matrices"
    rows.append(faster(f"model FLOPs, {precision}: share of the matmul rate", model, peak, name, "GFLOP/s"))
    return rows


def _loop_row(threads: int) -> Row:
    """The loop's time beyond the engine's step, as a share of that step, against 2%."""
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.loop", str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
    )
    if result.returncode != 0:
        raise RuntimeError(f"loop benchmark failed:\n{result.stderr[-2000:]}")
    seconds = json.loads(result.stdout)
    return shorter("loop around the engine, share of a step", seconds["loop"] / seconds["step"], 0.02, "limit", "")


def _start_up_rows(rounds: int) -> list[Row]:
    """Seconds until the command line answers, against the limits that the project sets itself."""
    program = Path(sys.executable).with_name("scale-llm")
    check = ["--check", "model=llama_32m", "train.train_iters=10"]
    limits = {"scale-llm --help": (["--help"], 1.0), "scale-llm --check": (check, 3.0)}
    return [
        shorter(name, _seconds([str(program), *words], rounds), limit, "limit", "s")
        for name, (words, limit) in limits.items()
    ]


def _seconds(command: list[str], rounds: int) -> float:
    """Median over the rounds, after one that fills the file cache."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True)
        taken.append(time.perf_counter() - start)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return median(taken[1:])
