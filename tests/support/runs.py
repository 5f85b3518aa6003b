"""Whole runs of the program on half a megabyte of the standard library: by its command line, or on forked ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support.ranks import Ranks, environment

WORDS = [
    "model=tiny", "model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=176", "model.seq_length=64", "tokenizer.vocab_size=512", "data.embedded_megabytes=0.5",
    "data.split='90,10,0'", "train.micro_batch_size=4", "train.global_batch_size=8", "train.train_iters=20",
    "train.eval_interval=5", "train.eval_iters=1", "optim.lr=1e-3", "optim.lr_warmup_iters=5", "precision=fp32",
    "cluster=local_cpu", "cluster.omp_num_threads=1", "model.compile_ops=false",
]  # fmt: skip

TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
RANKS2 = "cluster.nproc_per_node=2"
PADDED, BUDGET = "stage.batching=padded", "stage.batching=token_budget"

SPLITS = {
    "padded_by_two": [PADDED, "train.micro_batch_size=2"],
    "budget_dp2": [BUDGET, RANKS2],
    "padded_tp2_sp": [PADDED, TP2, SP],
    "budget_pp2": [BUDGET, PP2],
    "budget_cp2": [BUDGET, CP2],
}
"""Ways to split the same samples into micro-batches and over ranks: all compute the same."""


class Runs:
    """Starts runs whose data lie in one cache."""

    def __init__(self, ranks: Ranks, cache: Path, device: str = "cpu"):
        """device: of runs by the command line."""
        self._ranks, self.cache, self._device = ranks, cache, device

    def words(self, run_dir: Path, *more: str) -> list[str]:
        # What reads rows with a model as it is refuses the keys of training
        without = ("train.", "optim.", "data.") if {"stage=score", "stage=generate"} & set(more) else ()
        fixed = [word for word in WORDS if not word.startswith(without)]
        device = [] if self._device == "cpu" else [f"cluster.device={self._device}"]
        return [*fixed, *device, f"data.cache_dir={self.cache}", f"run_dir={run_dir}", *more]

    def start(self, run_dir: Path, *more: str) -> subprocess.Popen:
        """The real command line, its output in one pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "scale_llm.launch.cli", *self.words(run_dir, *more)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(self._device),
        )  # fmt: skip

    def command(self, run_dir: Path, *more: str, status: int = 0) -> str:
        """What the command line prints; it must end with `status`."""
        process = self.start(run_dir, *more)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == status, output[-4000:]
        return output

    def __call__(self, run_dir: Path, *more: str, limit_bytes: int | None = None, nodes: int = 1) -> list[str]:
        """The same run on forked ranks, which saves the start of Python; returns the problems it ended with.

        limit_bytes: no file may grow beyond, as on a full disk.
        """
        ends = self.on_ranks("support.stage:run", run_dir, *more, nodes=nodes, limit_bytes=limit_bytes)
        assert all(end == ends[0] for end in ends), "ranks must end alike"
        return ends[0]

    def on_ranks(self, function: str, run_dir: Path, *more: str, nodes: int = 1, **arguments) -> list[Any]:
        """What `module:function`, called with the directory of a run that is ready to start, returns on each rank.

        nodes: of one rank each, as torchrun would have started them; 1: the ranks that the words say.
        """
        from scale_llm.launch.runs import compose_run, open_run, validate

        started = {"RANK": "0", "WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": "1"} if nodes > 1 else {}
        with patch.dict(os.environ, started):
            plan = compose_run(self.words(run_dir, *more))
        validate(plan)
        open_run(plan.cfg)
        cluster = plan.cfg.cluster
        return self._ranks.fresh(cluster.nnodes * cluster.nproc_per_node, function, run_dir=str(run_dir), **arguments)

    def resumed_and_whole(self, directory: Path, *words: str, stop: int, iteration: int) -> tuple[Path, Path]:
        """A run that stops at `stop` and is resumed, and the same in one go: they log and save the same bits."""
        resumed, whole = directory / "resumed", directory / "whole"
        assert self(resumed, *words, f"train.exit_interval={stop}") == []
        assert latest(resumed) == stop
        assert self(resumed, *words) == []
        assert self(whole, *words) == []
        self.assert_same_bits(resumed, whole, iteration)
        return resumed, whole

    def assert_same_bits(self, run_dir: Path, other: Path, iteration: int = 20) -> None:
        """In metrics.jsonl and in every tensor saved."""
        assert rows(run_dir) == rows(other)
        different = {name: d for name, d in self.differences(run_dir, other, iteration).items() if d}
        assert not different, different

    def differences(self, run_dir: Path, other: Path, iteration: int = 20) -> dict[str, float]:
        """Largest relative difference of every tensor in two checkpoints; 0.0 only where all bits are equal."""
        paths = [str(d / "checkpoints" / f"iter_{iteration:07d}") for d in (run_dir, other)]
        return self._ranks.fresh(1, "support.stage:differences", paths=paths)[0]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what no two runs share."""
    times = ("iteration-time", "throughput", "tokens-per-second", "timing_s/", "perf/")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(times)} for line in lines]


def assert_close(run_dir: Path, other: Path, tolerance: float = 3e-5) -> None:
    """Every metric of training and validation of two runs, relative to 1 or the value. In the first iteration a policy
    is its reference and rounding alone decides whose reward is higher, so its accuracies are left out."""
    found, wanted = rows(run_dir), rows(other)
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, like in zip(found, wanted, strict=True):
        is_reference = like["iteration"] == 1 and abs(like.get("rewards/margins", 1.0)) < 1e-5
        for key, value in like.items():
            if key == "rewards/accuracies" and is_reference:
                continue
            assert abs(row[key] - value) <= tolerance * max(1.0, abs(value)), (row["iteration"], key, row[key], value)


def last_validation(run_dir: Path) -> dict[str, Any]:
    """What the last evaluation logged."""
    return [row for row in rows(run_dir) if any(" validation" in key for key in row)][-1]


def words_from(fixed: list[str]) -> Callable[..., list[str]]:
    """(base, data, more words) -> the words of a run that starts from `base`, `fixed` among them."""
    return lambda base, data, *more: [*fixed, f"data.path={data}", f"checkpoint.load={base}", *more]


def losses(run_dir: Path) -> list[float]:
    """The training loss of every iteration."""
    return [row["lm loss"] for row in rows(run_dir) if "lm loss" in row]


def latest(run_dir: Path) -> int:
    return int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
