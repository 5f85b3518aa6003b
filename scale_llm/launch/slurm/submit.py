"""From a composed run to a job in the queue: the run directory, its job script, sbatch."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from scale_llm.config.errors import UserError, numbered
from scale_llm.config.io import CONFIG_FILE, load_config, write_text
from scale_llm.config.run import RunConfig
from scale_llm.launch import lock
from scale_llm.launch.run_directory import greeting, prepare_run_dir
from scale_llm.launch.slurm import commands
from scale_llm.launch.slurm.script import SCRIPT, render

JOB = "job.json"
Points = Sequence[tuple[str, RunConfig]]


def submit(cfg: RunConfig) -> int:
    """Submit one validated run and say so."""
    if problems := commands.needed("sbatch"):
        raise UserError(problems)
    job = submit_one(cfg)
    print(f"submitted job {job}; it writes to {cfg.run_dir}/logs/job-{job}.out")
    print(f"scale-llm status {cfg.run_dir}")
    return 0


def submit_points(points: Points, *, dry_run: bool = False) -> int:
    """Submit every point of a sweep and print a table of jobs, or print their scripts; the exit status."""
    if dry_run:
        if any(cfg.cluster.launcher.value != "slurm" for _, cfg in points):
            raise UserError("--dry-run: prints the job script of cluster=slurm; for a local run take --check")
        print("\n".join(render(cfg) for _, cfg in points), end="")
        return 0
    if problems := commands.needed("sbatch"):
        raise UserError(problems)
    rows, status = [], 0
    for name, cfg in points:
        try:
            rows.append((name, submit_one(cfg), cfg.run_dir))
        except UserError as error:  # what is in the queue stays there, and is in the table
            rows.append((name, numbered(error.problems), cfg.run_dir))
            status = error.exit_status
    _print_table(rows)
    return status


def submit_one(cfg: RunConfig) -> str:
    """Write the run directory and submit its script; returns the job's id."""
    if found := busy(cfg.run_dir):
        raise UserError(found)
    print(greeting(cfg), flush=True)
    write_run(cfg)
    script = Path(cfg.run_dir) / SCRIPT
    write_text(script, render(cfg))
    job = commands.submit(script)
    record_job(cfg.run_dir, job)
    return job


def write_run(cfg: RunConfig) -> None:
    """config.yaml and what else a job finds, without its data: those are made on the job's first node."""
    keep_settled(cfg)
    kept = prepare_run_dir(cfg)
    if kept is not None:
        print(f"the configuration has changed; the former one is {kept}", flush=True)


def keep_settled(cfg: RunConfig) -> None:
    """What the first start's node has decided stays for the life of the run, as other kernels give other numbers."""
    path = Path(cfg.run_dir) / CONFIG_FILE
    if not path.is_file():
        return
    former = load_config(path)
    if former.cluster.device is not cfg.cluster.device:
        return
    if cfg.precision.auto and not former.precision.auto:
        cfg.precision.auto, cfg.precision.bf16 = False, former.precision.bf16
    if cfg.model.compile_ops is None:
        cfg.model.compile_ops = former.model.compile_ops


def busy(run_dir: str) -> list[str]:
    """The problem of a directory that another run is at work in, or is queued for."""
    if lock.is_held(run_dir):
        return [lock.refusal(run_dir)]
    job = recorded_job(run_dir)
    state = commands.job_state(job) if job is not None else None
    if state is None or state[0] not in commands.ALIVE:
        return []
    return [f"run_dir={run_dir}: job {job} is {state[0]} on it; wait for it, scancel {job}, or give another run_dir"]


def record_job(run_dir: Path | str, job: str) -> None:
    """Which job the directory belongs to now."""
    write_text(Path(run_dir) / JOB, json.dumps({"job": job, "recorded": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")


def recorded_job(run_dir: Path | str) -> str | None:
    """The job that the directory belongs to; None for a run that Slurm never had."""
    try:
        return str(json.loads((Path(run_dir) / JOB).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="submitted", title_justify="left")
    for column in ("point", "job", "run_dir"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
