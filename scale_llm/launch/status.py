"""scale-llm status RUN_DIR...: how runs stand, by Slurm where it knows them, else by their directories. No torch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_llm.config.batch import total_iterations
from scale_llm.config.checkpoint_files import iteration_dir, latest_checkpoint
from scale_llm.config.errors import UsageError, UserError
from scale_llm.config.io import CONFIG_FILE, load_config
from scale_llm.config.run import RunConfig
from scale_llm.config.timeline import Event
from scale_llm.launch import lock, restarts
from scale_llm.launch.slurm import commands
from scale_llm.launch.slurm.submit import recorded_job
from scale_llm.launch.sweep import last_row

COLUMNS = ("run_dir", "state", "iteration", "loss", "throughput", "checkpoint", "restarts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How one run stands, as text."""

    run_dir: str
    state: str
    why: str
    """Why it stopped, in a line below the table; empty where it did not."""
    iteration: str
    loss: str
    throughput: str
    checkpoint: str
    restarts: str

    def row(self) -> tuple[str, ...]:
        return (
            self.run_dir, self.state, self.iteration, self.loss, self.throughput, self.checkpoint, self.restarts
        )  # fmt: skip


def status(words: Sequence[str]) -> int:
    """Print the table; the exit status."""
    if not words or any(word.startswith("-") for word in words):
        raise UsageError("status: give one or more run directories: scale-llm status runs/first runs/sweep/*")
    missing = [word for word in words if not (Path(word) / CONFIG_FILE).is_file()]
    if missing:
        raise UserError([f"status {word}: holds no {CONFIG_FILE}; give the run_dir of a run" for word in missing])
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column not in ("run_dir", "state"))
    console, found = Console(highlight=False), [standing(word) for word in words]
    for one in found:
        table.add_row(*one.row())
    console.print(table)
    for one in found:
        if one.why:
            console.print(f"{one.run_dir}: {one.why}", markup=False, soft_wrap=True)
    return 0


def standing(run_dir: str) -> Standing:
    """How one run stands."""
    cfg, row = load_config(run_dir), last_row(run_dir)
    events = restarts.history(run_dir)
    done, total = int(row.get("iteration", 0)), _total(cfg)
    state, why = _state(run_dir, finished=total is not None and 0 < total <= done, events=events)
    return Standing(
        run_dir=run_dir,
        state=state,
        why=why,
        iteration=f"{done}/{'?' if total is None else total}",
        loss=_loss(row),
        throughput=_throughput(row),
        checkpoint=_checkpoint(cfg, Path(run_dir)),
        restarts=str(restarts.count_restarts(events)),
    )


def _loss(row: dict[str, Any]) -> str:
    """The loss of a row of metrics.jsonl; of a policy what its answers are worth."""
    rewards = [value for name, value in row.items() if name.startswith("critic/score/mean")]
    if rewards:
        return f"reward {rewards[0]:.4f}"
    return _shown(next((value for name, value in row.items() if " loss" in name), None), "{:.4f}")


def _total(cfg: RunConfig) -> int | None:
    if cfg.train.train_iters is None and cfg.train.train_samples is None:
        return None
    return total_iterations(cfg.train)


def _state(run_dir: str, *, finished: bool, events: list[Event]) -> tuple[str, str]:
    """Slurm's word for a job that it has, else what the directory says; and why it stopped.

    Slurm calls a job that stopped itself FAILED or COMPLETED: the reason is in our own history.
    """
    why = "" if finished else _last_reason(events)
    job = recorded_job(run_dir)
    found = commands.job_state(job) if job is not None and commands.present("squeue") else None
    if found is not None:
        state, detail = found
        if state not in commands.ALIVE:
            return f"job {job} {state}", why
        return f"job {job} {state}" + (f" ({detail})" if detail else ""), ""
    if lock.is_held(run_dir):
        by = lock.holder(run_dir)
        return f"running on {by.get('host', '?')}", ""
    return ("done", "") if finished else ("stopped", why)


def _last_reason(events: list[Event]) -> str:
    ends = [event for event in events if event["event"] == "end"]
    return str(ends[-1].get("reason", "")) if ends else ""


def _throughput(row: dict[str, Any]) -> str:
    """Of the whole job; where a step is timed by its FLOPs alone, of a GPU."""
    if "tokens-per-second" in row:
        return _shown(row["tokens-per-second"], "{:,.0f} tok/s")
    return _shown(row.get("throughput"), "{:.1f} TFLOP/s")


def _checkpoint(cfg: RunConfig, run_dir: Path) -> str:
    """The iteration of the last one and its age. A relative run_dir may be read from another directory."""
    for place in filter(None, (cfg.checkpoint.save, str(run_dir / "checkpoints"))):
        try:
            found = latest_checkpoint(place)
        except (ValueError, OSError) as error:
            return str(error)
        if found is not None:
            path = iteration_dir(place, found[0])
            return f"{found[0]}{_age(path)}"
    return "none"


def _age(path: Path) -> str:
    try:
        seconds = time.time() - path.stat().st_mtime
    except OSError:
        return " (is not there)"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f", {seconds / size:.0f} {unit} ago"
    return f", {max(0, seconds):.0f} s ago"


def _shown(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""
