"""scale-llm -m: one run for each point of a product of values, one after the other."""

import hashlib
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_llm.config.errors import UserError
from scale_llm.launch import runs

LONGEST = 200
"""Bytes of a point's name. File systems take 255, and some names are made of this one and more."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How one point ended."""

    point: str
    run_dir: str
    status: int
    seconds: float


def points(words: list[str]) -> list[tuple[str, list[str]]]:
    """Name and words of every point. The name is a directory's, of its own, and holds what differs between points:
    `optim.lr=0.001,train.seed=1`."""
    from scale_llm.config.compose import expand_sweep

    expanded = list(dict.fromkeys(map(tuple, expand_sweep(words))))
    changing = {word for point in expanded for word in point if not all(word in other for other in expanded)}
    texts = [",".join(word for word in point if word in changing) for point in expanded]
    names = [_directory(text) for text in texts]
    unique = [
        name if names.count(name) == 1 and len(name) <= LONGEST else _with_digest(name, text)
        for name, text in zip(names, texts, strict=True)
    ]
    return [(name, list(point)) for name, point in zip(unique, expanded, strict=True)]


def _directory(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text)


def _with_digest(name: str, text: str) -> str:
    """What `_directory` makes alike, or is too long for a file system, is told apart by the words themselves."""
    return f"{name[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def sweep(words: list[str], do: str = "run") -> int:
    """Check every point, then do what `runs.ACTIONS` has under this name; returns 0 if all succeeded, else the first
    failing status."""
    planned = [(name, runs.compose_run(point, name or None)) for name, point in points(words)]
    if do == "run" and (join := planned[0][1].join) is not None:
        raise UserError(
            f"-m: the process that {join.starter} has started becomes a rank of the first point, and the others would "
            f"never run; give -m without {join.starter}, or start every point with a {join.starter} of its own"
        )
    find = {"config": lambda plan: [], "prepare": runs.data_problems}.get(do, runs.problems)
    problems = [f"[{name}] {problem}" for name, plan in planned for problem in find(plan)]
    if problems:
        raise UserError(problems)
    if do in ("config", "check", "prepare"):
        for name, plan in planned:
            print(f"\n# {name}", flush=True)
            runs.ACTIONS[do](plan)
        return 0
    if do == "dry_run" or planned[0][1].is_job:
        from scale_llm.launch.slurm.submit import submit_points

        return submit_points([(name, plan.cfg) for name, plan in planned], dry_run=do == "dry_run")
    outcomes = []
    for number, (name, plan) in enumerate(planned, 1):
        print(f"sweep {number}/{len(planned)}: {name}", flush=True)
        outcomes.append(_run(name, plan))
        if outcomes[-1].status > 128:  # a signal: the user wants the sweep to end, not only this point
            break
    print_outcomes(outcomes)
    return next((outcome.status for outcome in outcomes if outcome.status), 0)


def _run(name: str, plan: runs.Planned) -> Outcome:
    from scale_llm.config.errors import numbered

    start = time.monotonic()
    try:
        status = runs.execute(plan)
    except UserError as error:
        print(numbered(error.problems), file=sys.stderr)
        status = error.exit_status
    return Outcome(point=name, run_dir=plan.cfg.run_dir, status=status, seconds=time.monotonic() - start)


def last_row(run_dir: str) -> dict[str, Any]:
    """The newest value of every key in metrics.jsonl."""
    merged: dict[str, Any] = {}
    try:
        for line in (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            merged.update(json.loads(line))
    except (OSError, ValueError):
        pass
    return merged


def print_outcomes(outcomes: list[Outcome]) -> None:
    """The table at the end of a sweep."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"sweep in {Path(outcomes[0].run_dir).parent}", title_justify="left")
    for column in ("point", "state", "iteration", "lm loss", "validation", "seconds"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        row = last_row(outcome.run_dir)
        state = "done" if outcome.status == 0 else f"failed ({outcome.status})"
        values = [_number(row.get(key)) for key in ("iteration", "lm loss", "lm loss validation")]
        table.add_row(outcome.point, state, *values, f"{outcome.seconds:.0f}")
    Console().print(table)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
