"""One rank: python -m scale_llm.launch.rank RUN_DIR [--joined]. Reads config.yaml and runs its stage.

Every rank but the last writes its output to RUN_DIR/logs/rank_<n>.log. The last keeps the terminal, which its log
line and progress bar need, and copies to its log file.
"""

import os
import re
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from scale_llm.config.errors import UserError, numbered
from scale_llm.config.io import load_config

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def log_path(run_dir: Path | str, rank: int) -> Path:
    """Where a rank's output goes."""
    return Path(run_dir) / "logs" / f"rank_{rank}.log"


class Copied:
    """A text stream that also writes whole lines to a log file, without the terminal's control codes."""

    def __init__(self, stream: IO[str], log: IO[str]):
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        if "\x1b" not in text:
            self._log.write(text)
        elif not text.startswith(("\x1b", "\r")):  # frames of a progress bar start with cursor movements
            self._log.write(ESCAPES.sub("", text))
        return self._stream.write(text)

    def flush(self) -> None:
        self._log.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redirect(run_dir: Path, rank: int, world_size: int) -> int | None:
    """Send this rank's output to its log file; the last rank's also to where it went.

    Returns a descriptor of the standard error there was before, None on the last rank.
    """
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the process
    if rank == world_size - 1:
        sys.stdout, sys.stderr = Copied(sys.stdout, log), Copied(sys.stderr, log)  # type: ignore[assignment]
        return None
    before = os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    return before


def run(run_dir: Path) -> int:
    """Run the stage of this run directory on this rank; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    errors = get_error_handler()
    errors.initialize()  # crashes of C++ code leave a Python traceback too
    try:
        cfg = load_config(run_dir)
        from scale_llm import stages

        stages.run(cfg)
        return 0
    except UserError as error:
        errors.record_exception(error)
        print(numbered(error.problems), file=sys.stderr, flush=True)
        return error.exit_status
    except SystemExit:
        raise
    except BaseException as error:
        errors.record_exception(error)
        traceback.print_exc()
        sys.stderr.flush()
        return 1


def main() -> None:
    run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    before = redirect(run_dir, rank, int(os.environ["WORLD_SIZE"]))
    status = run(run_dir)
    if status and before is not None and "--joined" in sys.argv:  # no launcher of ours points to the log
        os.write(before, f"rank {rank} failed; its log is {log_path(run_dir, rank)}\n".encode())
    sys.exit(status)


if __name__ == "__main__":
    main()
