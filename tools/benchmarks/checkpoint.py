"""What saving costs a run: the stall of an asynchronous save, the steps that it slows, and the rate of a write.

A real engine (BF16 weights, FP32 main weights, Adam) saves its whole state to one disk; steps of training go on while a
background save writes. In turns: a plain write of the same bytes in as many files, with an fsync each; the same with
the kernel asked to begin writing to the disk at once; a synchronous save; background saves of ours, of megatron-core
(its own queue and writer) and of torch.distributed.checkpoint. Before each, files of the one before are removed and the
disk is quiet. Medians of rounds.

The stall is all time between two steps, on the slowest rank: in the call that saves, and in those that look whether it
is done. What a save costs in all is the time until it is published, less that of as many undisturbed steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.rows import Row, faster, shorter

HELP = "stall of an asynchronous save against a synchronous one, steps slowed by it, and the rate of a plain write"
EXAMPLES = """examples:
  python tools/benchmark.py checkpoint --out checkpoint.json
  python tools/benchmark.py checkpoint --out checkpoint.json --layers 2 --rounds 5 --layouts one
"""
_TOOLS = Path(__file__).resolve().parents[1]

LAYOUTS = {
    "one": ("1 rank", 1, {}),
    "tp2": ("2 ranks, tensor parallel", 2, {"tp": 2}),
    "distributed": ("2 ranks, distributed optimizer", 2, {"distributed": True}),
}
"""name -> (in rows, ranks, settings of the engine)."""

PEERS = {"megatron": "megatron-core, asynchronous", "torch": "torch's async_save"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers", type=int, default=8, help="of a model of hidden size 1024 (default: 8, 1.5 GB of state)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the alternation (default: 5; medians of them)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--directory", type=Path, help="where checkpoints go, twice their size (default: temporary)")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows of every layout, each of which is a job of its own."""
    rows = []
    for name in arguments.layouts:
        title, ranks, settings = LAYOUTS[name]
        with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=arguments.directory) as directory:
            settings = {**settings, "layers": arguments.layers, "rounds": arguments.rounds, "directory": directory}
            rows += _rows(title, _job(ranks, settings))
    return rows


def _job(ranks: int, settings: dict) -> dict[str, list[float]]:
    """Starts the ranks, two threads over all of them; returns what rank 0 prints."""
    path = os.pathsep.join([str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    port = str(20000 + os.getpid() % 20000)
    shared = {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(2 // ranks), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "THP_MEM_ALLOC_ENABLE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.checkpoint_rank", json.dumps(settings)]
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        output, _ = processes[0].communicate()
        if any([process.wait() for process in processes]):
            raise RuntimeError(f"{' '.join(command)} failed")
    finally:
        for process in processes:
            process.kill()
    return json.loads(output)


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
