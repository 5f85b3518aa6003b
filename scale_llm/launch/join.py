"""Joins ranks that torchrun or srun started: the first prepares the run, the others wait, then each becomes a rank."""

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from scale_llm.config.errors import UserError
from scale_llm.config.io import write_text
from scale_llm.config.run import RunConfig
from scale_llm.launch.environment import Joined, rank_variables
from scale_llm.launch.lock import take

MINUTES_TO_PREPARE = 120
READY = ".ready"


def join_ranks(cfg: RunConfig, join: Joined, identity: str) -> NoReturn:
    """Replace this process by the rank, so that its starter watches the rank itself."""
    from scale_llm.launch.runs import open_run

    ready = Path(cfg.run_dir) / READY
    if join.rank == 0:
        take(cfg.run_dir, wait_seconds=30, inheritable=True)  # a restarted rank's predecessor may still be dying
        open_run(cfg)
        write_text(ready, identity)
    else:
        wait_until_ready(ready, identity, join)
    environment = {**os.environ, **join.variables(), **rank_variables(cfg)}
    command = [sys.executable, "-u", "-m", "scale_llm.launch.rank", cfg.run_dir, "--joined"]
    os.execve(sys.executable, command, environment)


def wait_until_ready(
    ready: Path, identity: str, join: Joined, poll_seconds: float = 0.2, failed: str | None = None
) -> None:
    """Wait for rank 0. A mark left by an earlier start counts only if that was the same run, whose data are there.

    failed: the mark of a rank 0 that could not prepare the run.
    """
    deadline = time.monotonic() + MINUTES_TO_PREPARE * 60
    while time.monotonic() < deadline:
        try:
            mark = ready.read_text(encoding="utf-8")
            if mark == identity:
                return
            if failed is not None and mark == failed:
                raise UserError(f"run_dir={ready.parent}: rank 0 could not prepare it; see its output")
        except OSError:
            pass  # not there yet, or a network file system between two states
        time.sleep(poll_seconds)
    raise UserError(
        f"run_dir={ready.parent}: rank {join.rank} has waited {MINUTES_TO_PREPARE} minutes for rank 0 to prepare "
        "it; see the output of rank 0, and that run_dir lies on a file system all nodes share"
    )
