"""Draws the curves of one or more runs: python tools/plot.py RUN_DIR [RUN_DIR ...] --out curves.png

Reads metrics.jsonl. Loss or reward (training and validation), learning rate, gradient norm and speed against
iterations.
"""

import argparse
import json
import os
from pathlib import Path

PANELS = {
    "loss": ["lm loss", "lm loss validation"],
    "preference loss": [
        "dpo loss",
        "dpo loss validation",
        "reward loss",
        "reward loss validation",
    ],
    "held-out answers in the right order": ["rewards/accuracies validation"],
    "mean reward of sampled answers": ["critic/score/mean"],
    "mean reward of answers to held-out prompts": ["critic/score/mean validation"],
    "learning rate": ["learning-rate"],
    "gradient norm": ["grad-norm"],
    "tokens per second": ["tokens-per-second"],
}


def read_metrics(run_dir: Path) -> list[dict]:
    """Rows of a run's metrics.jsonl."""
    with open(run_dir / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def curve(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of the rows that have the key."""
    points = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """One panel a quantity, one line a run; written under a temporary name first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {title: keys for title, keys in PANELS.items() if any(row.get(key) is not None for key in keys
             for rows in runs.values() for row in rows)}  # fmt: skip
    columns = 2 if len(shown) < 5 else 3
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5.5 * columns, 3.5 * lines), layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(shown) :]:
        panel.axis("off")
    for panel, (title, keys) in zip(axes.flat, shown.items(), strict=False):
        for number, (name, rows) in enumerate(runs.items()):
            for key in keys:
                x, y = curve(rows, key)
                if not x:
                    continue
                held_out = key.endswith("validation")
                style = {"marker": "o", "markersize": 4, "linestyle": "--"} if held_out else {}
                panel.plot(x, y, color=f"C{number}", label=f"{name}: validation" if held_out else name, **style)
        panel.set_title(title)
        panel.set_xlabel("iteration")
        panel.set_ylim(bottom=0 if title == "tokens per second" else None)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", framealpha=0.6)
    temporary = out.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    os.replace(temporary, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, help="run directories with a metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write (default: %(default)s)")
    arguments = parser.parse_args()
    missing = [str(d) for d in arguments.run_dirs if not (d / "metrics.jsonl").is_file()]
    if missing:
        parser.error(f"no metrics.jsonl in {', '.join(missing)}: name run directories of training runs")
    draw({d.name: read_metrics(d) for d in arguments.run_dirs}, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
