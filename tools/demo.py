"""The whole chain on the embedded corpus, on this machine: python tools/demo.py (or: make demo)

Collects the standard library's text, curates it (copies go, mail addresses are masked; where `.[curate]` is
installed), trains a tokenizer, indexes tokens, pretrains on two tensor-parallel ranks, evaluates, fine-tunes on
questions about the library, learns to prefer their own answers to others (a reward model, DPO), learns from the rewards
of answers of its own (PPO by that reward model, GRPO by their length), draws the curves and prints a table. A stage
that is done already is not run again; one that was interrupted resumes. Everything lies in runs/demo/.
"""

import argparse
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from plot import draw, read_metrics
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class DemoStage:
    """One run of the chain: its experiment, and what it takes from the stages before."""

    name: str
    overrides: tuple[str, ...]
    result: str
    """File whose presence, with an unchanged configuration, means that the stage is done."""


def stages(root: Path) -> list[DemoStage]:
    data = f"data.cache_dir={root / 'data'}"
    text = (f"data.path={root / CURATED / 'documents'}",) if is_curated(root) else ()
    base, tuned = (f"checkpoint.load={root / stage / 'checkpoints'}" for stage in ("pretrain", "sft"))
    return [
        DemoStage("pretrain", (data, *text, "train.log_interval=10"), "done.json"),
        DemoStage("evaluate", (data, *text, base), "evaluation.json"),
        DemoStage("sft", (data, base, "train.log_interval=5"), "done.json"),
        DemoStage("reward", (data, tuned), "done.json"),
        DemoStage("dpo", (data, tuned), "done.json"),
        DemoStage("ppo", (data, tuned, f"reward.load={root / 'reward' / 'checkpoints'}"), "done.json"),
        DemoStage("grpo", (data, tuned), "done.json"),
    ]


CURATED = "curate"
"""Below the root: where the curated corpus and its report lie."""
TASKS = 2
CURATION = ("curate=duplicates", "curate.sentences.enabled=false", "curate.pii.enabled=true", f"tasks={TASKS}")
"""Lines of code that many files have are no boilerplate, so sentences stay."""
TRAINED = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")
"""Stages with a curve."""
REWARD = "critic/score/mean validation"
"""What ppo and grpo have in place of a loss: the mean reward of answers to prompts that are held out."""


def is_curated(root: Path) -> bool:
    return (root / CURATED / "report.json").is_file()


def curate(root: Path, console: Console) -> None:
    """The embedded corpus without copies and near copies."""
    if is_curated(root):
        console.print(f"{CURATED}: done before, in {root / CURATED}", highlight=False)
        return
    if importlib.util.find_spec("datatrove") is None:
        console.print(f"{CURATED}: left out, as datatrove is not installed; pip install '.[curate]'", highlight=False)
        return
    from scale_llm.data.corpus import embedded_files, read_embedded

    raw = root / "data" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    files = embedded_files()
    for part in range(TASKS):  # a task reads whole files
        path = raw / f"stdlib_{part}.jsonl.gz"
        if not path.exists():  # the curation that goes on after an interruption knows its input by its time
            partial = path.with_name(f".{path.name}.partial")
            with gzip.open(partial, "wt", compresslevel=1, encoding="utf-8") as file:
                file.writelines(f"{json.dumps({'text': text})}\n" for text in read_embedded(files[part::TASKS]))
            os.replace(partial, path)
    command = ["tools/curate_data.py", *CURATION, f"input={raw}", f"output={root / CURATED}"]
    console.rule(f"[bold]{CURATED}")
    console.print("python", *command, style="dim", highlight=False)
    tool = Path(__file__).with_name("curate_data.py")
    run_to_end([sys.executable, str(tool), *command[1:]], CURATED, console)


def run_to_end(command: list[str], name: str, console: Console) -> None:
    """Waits for the command, after Ctrl-C too: the terminal sends that to both, and a stage saves before it ends."""
    process, interrupted = subprocess.Popen(command), False
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
    _go_on_after(130 if interrupted else status, name, console)


def _go_on_after(status: int, name: str, console: Console) -> None:
    """Ends the demo where what was run has not ended well."""
    if status:
        how = "was interrupted" if status == 130 else f"failed (exit status {status})"
        console.print(f"{name} {how}; run the same command again to go on", highlight=False)
        sys.exit(status)


def words(stage: DemoStage, root: Path, extra: list[str]) -> list[str]:
    """Command-line words of a stage's run."""
    return [f"experiment=demo_{stage.name}", f"run_dir={root / stage.name}", *stage.overrides, *extra]


def is_done(stage: DemoStage, root: Path, extra: list[str]) -> bool:
    """Whether the stage has finished with the configuration it would be run with now."""
    from scale_llm.config.io import CONFIG_FILE, to_yaml
    from scale_llm.config.pins import pin
    from scale_llm.launch.runs import compose_run

    run_dir = root / stage.name
    if not (run_dir / stage.result).is_file():
        return False
    planned = compose_run(words(stage, root, extra))
    pin(planned.cfg)
    return (run_dir / CONFIG_FILE).read_text() == to_yaml(planned.cfg)


def run(stage: DemoStage, root: Path, extra: list[str], console: Console) -> None:
    """Runs one stage as a user would; its output is the user's to see. In this process, as points of a sweep are: what
    ranks import is then imported once for all stages."""
    from scale_llm.launch.cli import main as scale_llm

    arguments = words(stage, root, extra)
    console.rule(f"[bold]{stage.name}")
    console.print(" ".join(["scale-llm", *arguments]), style="dim", highlight=False)
    began = time.monotonic()
    try:
        scale_llm(arguments)
    except SystemExit as end:
        _go_on_after(int(end.code or 0), stage.name, console)
    if stage.result == "done.json":
        (root / stage.name / stage.result).write_text(json.dumps({"seconds": time.monotonic() - began}))


def summary(root: Path) -> Table:
    """A row a stage: steps, first and last loss (of ppo and grpo: reward), speed, files."""
    table = Table(title="demo", title_justify="left")
    for column in ("stage", "steps", "first loss", "last loss", "tokens/s"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    table.add_column("files", overflow="fold")
    result = json.loads((root / "evaluate" / "evaluation.json").read_text())
    for stage in stages(root):
        if stage.name in TRAINED:
            _add_training(table, root / stage.name)
        else:
            loss = f"{result['lm loss']:.3f}"
            table.add_row(stage.name, str(result["iteration"]), "", loss, "", str(root / stage.name))
    table.caption = (
        f"{_curated(root)}{result['split']} split: perplexity {result['ppl']:.1f}, "
        f"{result['bits per byte']:.2f} bits per byte\n"
        f"held-out pairs in the right order: {_share_right(root / 'reward')} by the reward model, "
        f"{_share_right(root / 'dpo')} after DPO\n"
        "ppo, grpo: mean reward of answers to held-out prompts, before and after; "
        f"answers: {root / 'ppo' / 'transcripts.jsonl'}\n"
        f"answers before and after fine-tuning: {root / 'sft' / 'samples.md'}"
    )
    return table


def _curated(root: Path) -> str:
    if not is_curated(root):
        return ""
    found = json.loads((root / CURATED / "report.json").read_text())
    kept, read = found["documents_out"], found["documents_in"]
    return f"curation: {kept:,} of {read:,} documents kept; what went, and why: {root / CURATED / 'report.html'}\n"


def _share_right(run_dir: Path) -> str:
    rows = [row for row in read_metrics(run_dir) if "rewards/accuracies validation" in row]
    return f"{rows[-1]['rewards/accuracies validation']:.0%}" if rows else "not measured"


def _add_training(table: Table, run_dir: Path) -> None:
    rows = [row for row in read_metrics(run_dir) if "tokens-per-second" in row]
    loss = next((key for key in ("lm loss", "reward loss", "dpo loss") if key in rows[0]), None)
    if loss is not None:
        first, last = f"{rows[0][loss]:.3f}", f"{rows[-1][loss]:.3f}"
    else:
        rewards = [row[REWARD] for row in read_metrics(run_dir) if REWARD in row]
        first, last = (f"reward {reward:.3f}" for reward in (rewards[0], rewards[-1]))
    speed = sorted(row["tokens-per-second"] for row in rows)[len(rows) // 2]
    table.add_row(run_dir.name, str(rows[-1]["iteration"]), first, last, f"{speed:,.0f}", str(run_dir))


def main() -> None:
    from scale_llm.config.errors import UserError, numbered

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/demo"), help="where the runs lie (default: runs/demo)")
    parser.add_argument("overrides", nargs="*", help="configuration overrides for every stage, e.g. precision=fp32")
    arguments = parser.parse_args()
    console, root = Console(), arguments.root
    began = time.monotonic()
    curate(root, console)
    for stage in stages(root):
        try:
            done = is_done(stage, root, arguments.overrides)
        except UserError as error:
            sys.exit(numbered(error.problems))
        if done:
            console.print(f"{stage.name}: done before, in {root / stage.name}", highlight=False)
        else:
            run(stage, root, arguments.overrides, console)
    draw({name: read_metrics(root / name) for name in TRAINED}, root / "curves.png")
    console.print(summary(root))
    console.print(f"curves: {root / 'curves.png'}   time: {time.monotonic() - began:.0f} s", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on")
        sys.exit(130)
