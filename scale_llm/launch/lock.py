"""One run directory, one run: a lock that the kernel lets go when its holder dies, however it dies."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scale_llm.config.errors import UserError

LOCK = ".lock"


def take(run_dir: Path | str, *, wait_seconds: float = 0.0, inheritable: bool = False) -> int:
    """The file that holds the lock as long as it is open; raises UserError where another process has it.

    inheritable: the program that replaces this process holds it on. wait_seconds: for a holder that is about to end,
    such as the former start of this job.
    """
    path = Path(run_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be written ({error}); give another directory") from error
    os.set_inheritable(file, inheritable)
    deadline = time.monotonic() + wait_seconds
    while not _try(file):
        if time.monotonic() >= deadline:
            os.close(file)
            raise UserError(refusal(run_dir))
        time.sleep(0.2)
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(_this_process()).encode(), 0)
    return file


@contextlib.contextmanager
def held(run_dir: Path | str) -> Iterator[None]:
    """The lock for as long as this block runs."""
    file = take(run_dir)
    try:
        yield
    finally:
        os.close(file)


def is_held(run_dir: Path | str) -> bool:
    """Whether a run is at work in the directory at this moment."""
    try:
        file = os.open(Path(run_dir) / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try(file)
    finally:
        os.close(file)


def _try(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks; two jobs of Slurm are told apart by their ids all the same
    return True


def _this_process() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def holder(run_dir: Path | str) -> dict[str, Any]:
    """What the last holder wrote of itself; empty where that cannot be read."""
    try:
        found = json.loads((Path(run_dir) / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def refusal(run_dir: Path | str) -> str:
    """Who is at work in the directory, and what to do."""
    by = holder(run_dir)
    who = f"job {by['job']}" if by.get("job") else f"process {by.get('pid', '?')}"
    stop = f"scancel {by['job']}" if by.get("job") else f"kill {by.get('pid', '?')}"
    return (
        f"run_dir={run_dir}: {who} on {by.get('host', 'another host')} has been at work in it since "
        f"{by.get('since', 'some time')}; wait for it, stop it ({stop}), or give another run_dir"
    )
