"""How a start of a job has ended, and why."""

import json
import signal
from pathlib import Path
from typing import Any

from scale_llm.config.exit_status import REQUEUE
from scale_llm.config.run import RunConfig
from scale_llm.launch.failures import Failure, first_failure, is_for_a_person, text_of, user_problems
from scale_llm.launch.reached import iteration
from scale_llm.launch.slurm.task import ERROR_FILES

STOPPED = (REQUEUE, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)
"""A task that has not yet begun to listen dies of the signal; it has nothing to save, so that is no failure."""

BAD_NODES = "bad_nodes"
"""Below a run directory: the nodes that preflight.sh has found bad, separated by commas."""


def end_of(cfg: RunConfig, run_dir: Path, status: int) -> dict[str, Any]:
    """The facts of an end, for the timeline."""
    facts: dict[str, Any] = {"status": status, "iteration": iteration(cfg, run_dir)}
    bad = bad_nodes(run_dir)
    if status in STOPPED:
        return {**facts, "reason": "stopped by a signal", "signal": True}
    if bad is not None:
        return {**facts, "reason": f"preflight found bad nodes: {bad}"}
    message = _message(run_dir)
    if message is None:
        return {**facts, "reason": _of_status(status)}
    problems = user_problems(message)
    if problems:  # what a person has to mend another start would meet again
        final = {"final": True} if is_for_a_person(message) else {}
        return {**facts, "reason": "; ".join(problems), **final}
    return {**facts, "reason": (text_of(message).splitlines() or ["no message"])[0]}


def bad_nodes(run_dir: Path) -> str | None:
    """Their names, separated by commas."""
    try:
        return (run_dir / BAD_NODES).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def to_exclude(cfg: RunConfig, run_dir: Path) -> str | None:
    """The bad nodes, unless several were asked and all are bad: the cause is then something they share, as a disk."""
    bad, nodes = bad_nodes(run_dir), cfg.cluster.nnodes
    return None if bad is None or 1 < nodes <= len(bad.split(",")) else bad


def clear(run_dir: Path) -> None:
    """Forget how the start before has ended."""
    for path in [*run_dir.glob(ERROR_FILES.format(rank="*")), run_dir / BAD_NODES]:
        path.unlink(missing_ok=True)


def _message(run_dir: Path) -> Any:
    """What the rank that failed first has written."""
    failures = {}
    for path in sorted(run_dir.glob(ERROR_FILES.format(rank="*"))):  # rank 0 first: the others may have waited for it
        try:
            message = json.loads(path.read_text(encoding="utf-8"))["message"]
            stamp = int(message["extraInfo"]["timestamp"]) if isinstance(message, dict) else 0
        except (OSError, ValueError, KeyError, TypeError):
            continue
        failures[int(path.stem.rsplit("_", 1)[1])] = Failure(1, message, stamp)
    return first_failure(failures)[1].message if failures else None


def _of_status(status: int) -> str:
    """The words for a status without a message: shells and srun add 128 to a signal."""
    if status > 128:
        try:
            return f"a rank was killed by {signal.Signals(status - 128).name}"
        except ValueError:
            pass
    return f"srun ended with status {status}"
