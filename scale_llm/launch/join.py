"""Joins ranks that torchrun or srun started: the first prepares the run, the others wait, then each becomes a rank."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from scale_llm.config.errors import UserError
from scale_llm.config.io import write_text
from scale_llm.config.run import RunConfig
from scale_llm.launch.environment import Joined, environment_of, start_name
from scale_llm.launch.lock import take

MINUTES_TO_PREPARE = 120
SECONDS_FOR_THE_DYING = 30
"""A restarted rank's predecessor may still be dying, and holds the lock."""
SECONDS_TO_BELIEVE = 60
"""Longer than rank 0 needs to remove the mark of an earlier start, which torchrun gives no other name."""
READY = ".ready"


def join_ranks(cfg: RunConfig, join: Joined, identity: str) -> NoReturn:
    """Replace this process by the rank, so that its starter watches the rank itself."""
    from scale_llm.launch.runs import open_run

    ready, start = Path(cfg.run_dir) / READY, f"{identity} {start_name(join, os.environ)}"
    if join.rank == 0:
        with marked(ready, start):
            take(cfg.run_dir, wait_seconds=SECONDS_FOR_THE_DYING, inheritable=True)
            ready.unlink(missing_ok=True)
            open_run(cfg)
    else:
        wait_until_ready(ready, start, join)
    command = [sys.executable, "-u", "-m", "scale_llm.launch.rank", cfg.run_dir, "--joined"]
    os.execve(sys.executable, command, environment_of(cfg, join))


@contextmanager
def marked(ready: Path, start: str) -> Iterator[None]:
    """Tells the ranks that wait how rank 0 has fared in this block."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # what has failed may be the directory itself
            write_text(ready, f"failed {start}")
        raise
    write_text(ready, start)


def wait_until_ready(ready: Path, start: str, join: Joined, poll_seconds: float = 0.2) -> None:
    """Wait for rank 0, which has `marked` this start.

    An earlier start by torchrun may have the same name: its mark counts if that was the same run, whose data are there,
    and the mark of its failure only if it stays.
    """
    begun = time.monotonic()
    doubted = 0 if join.starter == "srun" else SECONDS_TO_BELIEVE
    while (waited := time.monotonic() - begun) < MINUTES_TO_PREPARE * 60:
        try:
            mark = ready.read_text(encoding="utf-8")
            if mark == start:
                return
            if mark == f"failed {start}" and waited >= doubted:
                raise UserError(f"run_dir={ready.parent}: rank 0 could not prepare it; see its output")
        except OSError:
            pass  # not there yet, or a network file system between two states
        time.sleep(poll_seconds)
    raise UserError(
        f"run_dir={ready.parent}: rank {join.rank} has waited {MINUTES_TO_PREPARE} minutes for rank 0 to prepare "
        "it; see the output of rank 0, and that run_dir lies on a file system all nodes share"
    )
