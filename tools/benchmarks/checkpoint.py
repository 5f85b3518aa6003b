"""What saving costs a run: the stall of an asynchronous save, the steps that it slows, and the rate of a write.

A real engine (BF16 weights, FP32 main weights, Adam) saves its whole state to one disk; steps of training go on while a
background save writes. Whoever is measured has a job of its own, as a fork takes longer the more memory a process has
held. In turns: a plain write of the same bytes in as many files, with an fsync each; the same with
the kernel asked to begin writing to the disk at once; a synchronous save; background saves of ours, of megatron-core
(its own queue and writer) and of torch.distributed.checkpoint. Before each, files that its job wrote before are
removed and the disk is quiet. Medians of rounds. Four jobs hold a model at once.

The stall is all time between two steps, on the slowest rank: in the call that saves, and in those that look whether it
is done. What a save costs in all is the time until it is published, less that of as many undisturbed steps.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ranks import Job
from benchmarks.rows import Row, faster, shorter

HELP = "stall of an asynchronous save against a synchronous one, steps slowed by it, and the rate of a plain write"
EXAMPLES = """examples:
  python tools/benchmark.py checkpoint --out checkpoint.json
  python tools/benchmark.py checkpoint --out checkpoint.json --layers 2 --rounds 5 --layouts one
"""

LAYOUTS = {
    "one": ("1 rank", 1, {}),
    "tp2": ("2 ranks, tensor parallel", 2, {"tp": 2}),
    "distributed": ("2 ranks, distributed optimizer", 2, {"distributed": True}),
}
"""name -> (in rows, ranks, settings of the engine)."""

JOBS = {
    "ours": ["sync", "ours"], "plain": ["sync", "plain", "behind"], "megatron": ["megatron"], "torch": ["torch"],
}  # fmt: skip
"""Each with whom it measures; a plain write is of as many bytes as a synchronous save wrote."""
WARM = 2
"""Rounds that are left out: plans are made twice before they serve, memory grows to what it will be."""
PEERS = {"megatron": "megatron-core, asynchronous", "torch": "torch's async_save"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers", type=int, default=8, help="of a model of hidden size 1024 (default: 8, 1.5 GB of state)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the alternation (default: 5; medians of them)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--directory", type=Path, help="where checkpoints go, five times their size (default: temporary)"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows of every layout, each of which is a job of its own."""
    rows = []
    for name in arguments.layouts:
        title, ranks, settings = LAYOUTS[name]
        with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=arguments.directory) as directory:
            settings = {**settings, "layers": arguments.layers}
            rows += _rows(title, _measured(Path(directory), ranks, settings, arguments.rounds))
    return rows


def _measured(directory: Path, ranks: int, settings: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Values of every round, by name. One job at a time is at work."""
    found: dict[str, list[float]] = {}
    with ExitStack() as running:
        jobs = {}
        for name, contestants in JOBS.items():
            (directory / name).mkdir()
            own = {**settings, "directory": str(directory / name), "contestants": contestants}
            jobs[name] = running.enter_context(Job("benchmarks.checkpoint_rank", ranks, own))
        for index in range(WARM + rounds):
            names = list(jobs)[index % len(jobs) :] + list(jobs)[: index % len(jobs)]
            turns = {name: jobs[name].turn() for name in names}
            values = {**turns["megatron"], **turns["torch"], **turns["plain"], **turns["ours"]}  # its own where shared
            if index >= WARM:
                for key, value in values.items():
                    found.setdefault(key, []).append(value)
                shown = ", ".join(f"{key} {value:.3f}" for key, value in values.items() if key != "bytes")
                print(f"round {index - WARM + 1}/{rounds}: {shown}", file=sys.stderr, flush=True)
    return found


def _rows(title: str, found: dict[str, list[float]]) -> list[Row]:
    middle = {name: median(values) for name, values in found.items()}
    gigabytes = middle["bytes"] / 1e9
    sync, step = middle["sync"], middle["undisturbed"]
    rates = [
        faster(
            f"{title}: synchronous save of {gigabytes:.2f} GB", gigabytes / sync, gigabytes / middle[name], peer, "GB/s"
        )
        for name, peer in {"plain": "plain write", "behind": "plain write, begun on early"}.items()
    ]
    stalls = [shorter(f"{title}: stall", middle["ours stall"], sync, "synchronous save", "s")]
    costs = [shorter(f"{title}: cost in all", middle["ours cost"], sync, "synchronous save", "s")]
    during = [shorter(f"{title}: a step meanwhile", middle["ours step"], step, "undisturbed step", "s")]
    for name, peer in PEERS.items():
        if f"{name} stall" in middle:
            stalls.append(shorter(f"{title}: stall", middle["ours stall"], middle[f"{name} stall"], peer, "s"))
            costs.append(shorter(f"{title}: cost in all", middle["ours cost"], middle[f"{name} cost"], peer, "s"))
            during.append(shorter(f"{title}: a step meanwhile", middle["ours step"], middle[f"{name} step"], peer, "s"))
    return rates + stalls + costs + during
