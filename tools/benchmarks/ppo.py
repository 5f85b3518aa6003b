"""Where the time of a PPO iteration goes: generation, scoring, updates, weight movement, waiting.

A run of stage=ppo on two ranks of this machine: actor and critic with tensor parallelism 2, generation by a whole model
on each rank (layout=hybrid without offload), so that weights are moved every iteration, and colocated, where the actor
itself generates. Medians of the iterations after the first ones.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.rows import Row

HELP = "where the time of a PPO iteration goes, with a bar chart"
EXAMPLES = """examples:
  python tools/benchmark.py ppo --out ppo.json          (and ppo.png beside it)
"""
PARTS = {
    "generation": ("gen",),
    "scoring": ("reward",),
    "log-probabilities and values": ("old_log_prob", "ref", "values"),
    "advantages": ("adv",),
    "updates": ("update_critic", "update_actor"),
    "weight movement": ("weights",),
    "idle": ("wait",),
}
"""Of the bar chart: parts of an iteration by their timing_s names."""

AIMS = {"weight movement": 0.02, "idle": 0.05}
"""Shares of an iteration, at most."""

LAYOUTS = {
    "colocated": ["layout=colocated"],
    "rollout on another layout": ["layout=hybrid", *(f"layout.{role}.offload=false" for role in (
        "actor", "rollout", "reference", "critic", "reward"))],
    "split": ["layout=split", "parallel=single"],
}  # fmt: skip
WARM = 2
"""Iterations that are left out: caches are made, functions compiled."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations of each layout (default: 5)")


def run(arguments: argparse.Namespace) -> list[Row]:
    """A row for each part and layout: its share of an iteration, beside the aim where there is one."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        base = _prepared(Path(directory))
        for name, words in LAYOUTS.items():
            found[name] = _seconds(base, Path(directory) / name.replace(" ", "_"), words, arguments.iterations)
    draw(found, arguments.out.with_suffix(".png"))
    print(f"chart: {arguments.out.with_suffix('.png')}")
    return [row for name, seconds in found.items() for row in _rows(name, seconds)]


def _rows(layout: str, seconds: dict[str, float]) -> list[Row]:
    whole = seconds["step"]
    rows = []
    for part in PARTS:
        share, aim = seconds[part] / whole, AIMS.get(part)
        against = ("at most", aim) if aim is not None and layout != "split" else ("the whole iteration", 1.0)
        rows.append(
            Row(
                measure=f"{layout}: {part}", ours=share, peer=against[1], peer_name=against[0],
                ratio=against[1] / share if against[0] == "at most" and share else share, unit="share of an iteration",
            )
        )  # fmt: skip
    return rows


MODEL = ["model=llama_32m", "model.seq_length=512", "precision=auto", "cluster=local_cpu", "cluster.nproc_per_node=2",
         "parallel=tp2", "tokenizer.vocab_size=8192", "data.embedded_megabytes=4"]  # fmt: skip


def _prepared(directory: Path) -> dict[str, Path]:
    """Checkpoints of a policy and a reward model that know little: time does not depend on what they know."""
    base, reward = directory / "base", directory / "reward"
    data = f"data.cache_dir={directory / 'data'}"
    _scale_llm(*MODEL, data, f"run_dir={base}", "train.train_iters=1", "train.global_batch_size=2",
               "train.eval_iters=0", "train.micro_batch_size=1")  # fmt: skip
    load = f"checkpoint.load={base / 'checkpoints'}"
    _scale_llm("stage=reward", *MODEL, "model=from_checkpoint", data, load, f"run_dir={reward}", "train.train_iters=1",
               "train.global_batch_size=2", "train.eval_iters=0")  # fmt: skip
    return {"base": base, "reward": reward, "data": directory / "data"}


def _seconds(base: dict[str, Path], run_dir: Path, layout: list[str], iterations: int) -> dict[str, float]:
    """Of each part of an iteration, and of the whole, `step`: medians."""
    _scale_llm(
        "stage=ppo", *MODEL, "model=from_checkpoint", f"data.cache_dir={base['data']}", f"run_dir={run_dir}",
        f"checkpoint.load={base['base'] / 'checkpoints'}", f"reward.load={base['reward'] / 'checkpoints'}",
        f"train.train_iters={WARM + iterations}", "train.global_batch_size=16", "train.micro_batch_size=4",
        "train.eval_iters=0", "stage.max_new_tokens=64", "stage.ppo_mini_batch_size=8", "stage.num_samples=0",
        *layout,
    )  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "timing_s/step" in row][WARM:]
    found = {
        part: median(sum(row.get(f"timing_s/{name}", 0.0) for name in names) for row in rows)
        for part, names in PARTS.items()
    }
    return {**found, "step": median(row["timing_s/step"] for row in rows)}


def _scale_llm(*words: str) -> None:
    """A run, its output shown where it fails."""
    command = [sys.executable, "-m", "scale_llm.launch.cli", *words, "logging.progress=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """A bar for each layout, seconds of an iteration by part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.7 * len(found)), layout="constrained")
    names = list(found)
    left = [0.0] * len(names)
    for part in PARTS:
        seconds = [found[name][part] for name in names]
        axes.barh(names, seconds, left=left, label=part)
        left = [start + width for start, width in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of an iteration (of a part, those of its slowest rank)")
    figure.legend(loc="outside upper center", fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
