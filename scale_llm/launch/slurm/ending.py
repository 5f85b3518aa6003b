"""How a start of a job has ended, and why."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from scale_llm.config.exit_status import REQUEUE
from scale_llm.config.run import RunConfig
from scale_llm.launch.failures import (
    LOST_PEER,
    Failure,
    first_failure,
    is_for_a_person,
    is_hang,
    text_of,
    user_problems,
)
from scale_llm.launch.rank import FINISHED
from scale_llm.launch.reached import iteration
from scale_llm.launch.slurm.nodes import BAD_NODES, USED, bad_nodes, node_of, used
from scale_llm.launch.slurm.task import ERROR_FILES

SECONDS_FOR_THE_MARK = 5
STOPPED = (REQUEUE, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)
"""A task that has not yet begun to listen dies of the signal; it has nothing to save, so that is no failure."""


def end_of(cfg: RunConfig, run_dir: Path, status: int) -> dict[str, Any]:
    """The facts of an end, for the timeline; its status is 0 only where the ranks have done all."""
    facts: dict[str, Any] = {"status": status, "iteration": iteration(cfg, run_dir)}
    bad = bad_nodes(run_dir)
    if status == 0:
        lost = {} if _has_finished(run_dir) else {"status": 1, "reason": "srun has ended before the ranks"}
        return {**facts, **lost}
    if status in STOPPED:
        return {**facts, "reason": "stopped by a signal", "signal": True}
    if bad is not None and not used(run_dir):
        return {**facts, "reason": f"preflight found bad nodes: {bad}"}
    failures = _failures(run_dir)
    if not failures:
        return {**facts, "reason": _of_status(status)}
    rank, failure = first_failure(failures)
    message, silent = failure.message, _silent(cfg, failures)
    if is_hang(message):
        facts["hang"] = True
    if silent is not None:
        what = "no progress; waited for" if is_hang(message) else "the others have lost"
        return {**facts, "reason": f"{what} rank {silent}", "rank": silent, "node": node_of(silent, cfg, run_dir)}
    facts |= {"rank": rank, "node": node_of(rank, cfg, run_dir)}
    problems = user_problems(message)
    if problems:  # what a person has to mend another start would meet again
        final = {"final": True} if is_for_a_person(message) else {}
        return {**facts, "reason": "; ".join(problems), **final}
    return {**facts, "reason": (text_of(message).splitlines() or ["no message"])[0]}


def _has_finished(run_dir: Path) -> bool:
    """Looks more than once: a file system of the network may tell later what another node has written."""
    mark = run_dir / FINISHED
    for second in range(SECONDS_FOR_THE_MARK + 1):
        if mark.parent.is_dir() and mark.name in os.listdir(mark.parent):
            return True
        if second < SECONDS_FOR_THE_MARK:
            time.sleep(1)
    return False


def clear(run_dir: Path) -> None:
    """Forget how the start before has ended."""
    left = (BAD_NODES, USED, FINISHED)
    for path in [*run_dir.glob(ERROR_FILES.format(rank="*")), *(run_dir / name for name in left)]:
        path.unlink(missing_ok=True)


def _failures(run_dir: Path) -> dict[int, Failure]:
    """What ranks have written of their failures."""
    failures = {}
    for path in sorted(run_dir.glob(ERROR_FILES.format(rank="*"))):  # rank 0 first: the others may have waited for it
        try:
            message = json.loads(path.read_text(encoding="utf-8"))["message"]
            stamp = int(message["extraInfo"]["timestamp"]) if isinstance(message, dict) else 0
        except (OSError, ValueError, KeyError, TypeError):
            continue
        failures[int(path.stem.rsplit("_", 1)[1])] = Failure(1, message, stamp)
    return failures


def _silent(cfg: RunConfig, failures: dict[int, Failure]) -> int | None:
    """The one rank that has left no word, where all the others have only waited for it or lost it."""
    ranks = set(range(cfg.cluster.nnodes * (cfg.cluster.nproc_per_node or 1)))
    left = ranks - set(failures)
    effects = all(is_hang(one.message) or LOST_PEER.search(text_of(one.message)) for one in failures.values())
    return left.pop() if len(left) == 1 and failures and effects else None


def _of_status(status: int) -> str:
    """The words for a status without a message: shells and srun add 128 to a signal."""
    if status > 128:
        try:
            return f"a rank was killed by {signal.Signals(status - 128).name}"
        except ValueError:
            pass
    return f"srun ended with status {status}"
