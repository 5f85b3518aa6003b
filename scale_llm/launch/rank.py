"""One rank: python -m scale_llm.launch.rank RUN_DIR [--joined] [--job], or forked (forked_ranks.py). Reads config.yaml
and runs its stage.

Every rank but the last writes its output to RUN_DIR/logs/rank_<n>.log. The last keeps the terminal, which its
log line and progress bar need, and copies to its log file.
"""

import ctypes
import faulthandler
import os
import re
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import IO, Any, NoReturn

from scale_llm.config.errors import UserError, numbered
from scale_llm.config.exit_status import HUNG, REQUEUE
from scale_llm.config.io import load_config, write_text
from scale_llm.launch.environment import quiet_imports

STACKS = signal.SIGUSR2
"""Has this rank write what every thread is doing into its log; from C, so that Python need not answer."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""Ask a run to save and to stop, or to stop."""

FINISHED = "logs/finished"
"""Below a run directory: rank 0 of a job's last start has done all. srun's status 0 does not say so: it ends with 0 too
when a node dies under --no-kill."""

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def log_path(run_dir: Path | str, rank: int) -> Path:
    """Where a rank's output goes."""
    return Path(run_dir) / "logs" / f"rank_{rank}.log"


def start_mark() -> str:
    """First line of one start in a log file that many starts append to."""
    return f"=== started {time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}\n"


class Copied:
    """A text stream that also writes to a log file, without the terminal's control codes."""

    def __init__(self, stream: IO[str], log: IO[str]):
        self._stream, self.log = stream, log

    def write(self, text: str) -> int:
        if "\x1b" not in text:
            self.log.write(text)
        elif not text.startswith(("\x1b", "\r")):  # frames of a progress bar start with cursor movements
            self.log.write(ESCAPES.sub("", text))
        return self._stream.write(text)

    def flush(self) -> None:
        self.log.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redirect(run_dir: Path, rank: int, world_size: int) -> IO[str]:
    """Send this rank's output to its log file, the last rank's also to where it went; returns the log."""
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a", buffering=1, encoding="utf-8")  # open as long as the process
    log.write(start_mark())
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == world_size - 1:
        sys.stdout, sys.stderr = Copied(sys.stdout, log), Copied(sys.stderr, log)  # type: ignore[assignment]
    else:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return log


def run(run_dir: Path, log: IO[str]) -> int:
    """Run the stage of this run directory on this rank; returns the exit status.

    Errors go to the log alone, and to the error file that the elastic agent reads: the launcher shows the first
    rank's that failed, once, instead of every rank's at a time.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    errors = get_error_handler()
    errors.initialize()  # crashes of C++ code leave a Python traceback too
    try:
        cfg = load_config(run_dir)
        from scale_llm import stages

        stages.run(cfg, log=log, hung=lambda hang: end_hung(errors, hang))
        return REQUEUE if "--job" in sys.argv and stopped_by_signal() else 0
    except UserError as error:
        record(errors, error)
        log.write(numbered(error.problems) + "\n")
        return error.exit_status
    except SystemExit as error:
        if not error.code:
            return 0
        record(errors, error)
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        record(errors, error)
        traceback.print_exc(file=log)
        return 1


def end_hung(errors: Any, hang: Exception) -> NoReturn:
    """From the thread that has found it: the main one will not answer."""
    record(errors, hang)
    os._exit(HUNG)


def record(errors: Any, error: BaseException) -> None:
    """Leaves the error to the elastic agent under a temporary name first: it may read, or kill this rank, at any time,
    and half a file would end the launcher with an error of its own."""
    variable = "TORCHELASTIC_ERROR_FILE"
    file = os.environ.get(variable)
    if file is None:
        errors.record_exception(error)
        return
    partial = f"{file}.partial"
    os.environ[variable] = partial
    try:
        errors.record_exception(error)
        if os.path.isfile(partial):
            os.replace(partial, file)
    finally:
        os.environ[variable] = file


def stopped_by_signal() -> bool:
    """Whether the stage has saved and stopped on a signal, and so is to be started again."""
    from scale_llm.stages.progress import StopRequest

    return StopRequest.granted


def die_with_parent() -> None:
    """Have the kernel kill this process if its parent is killed: an orphan would train on beside the next start."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))


def _show_name(rank: int) -> None:
    """In ps and top: ranks that are forked have the command line of the process they come from.

    Without a space: Slurm's proctrack/linuxproc reads the words of /proc/<pid>/stat, and would lose the task.
    """
    if sys.platform == "linux":
        set_name = 15  # PR_SET_NAME
        ctypes.CDLL(None).prctl(set_name, f"rank_{rank}".encode())


def main() -> None:
    """Entry point; --joined: no launcher of ours will point to the log; --job: a job script requeues on REQUEUE."""
    quiet_imports()
    _show_name(int(os.environ["RANK"]))
    # Ctrl-C before the stage listens for it: there is nothing to save, and a traceback of imports tells nobody anything
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if "--joined" not in sys.argv:
        die_with_parent()
    # A checkpoint's writers are forked: without their rank they would wait for it for ever
    os.register_at_fork(after_in_child=die_with_parent)
    terminal = os.dup(2)
    log = redirect(run_dir, rank, int(os.environ["WORLD_SIZE"]))
    faulthandler.register(STACKS, file=log, all_threads=True)
    # Advice to the libraries' own developers would bury what the run prints
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron|torch\.distributed")
    status = run(run_dir, log)
    if not status:
        if "--job" in sys.argv and rank == 0:
            write_text(run_dir / FINISHED, "")
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if "--joined" in sys.argv and status != REQUEUE:
        os.write(terminal, f"{failure_text(run_dir, rank)}\n".encode())
    os._exit(status)  # tearing gloo down while peers are gone aborts, which would hide the status


def failure_text(run_dir: Path | str, rank: int, lines_shown: int = 15) -> str:
    """Where a rank's log is, and the end of what its last start wrote there."""
    path = log_path(run_dir, rank)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"rank {rank} left no log in {path.parent}"
    starts = [number for number, line in enumerate(lines) if line.startswith("=== started ")]
    lines = lines[starts[-1] + 1 :] if starts else lines
    return "\n".join([f"the log of rank {rank} is {path}", *(f"  {line}" for line in lines[-lines_shown:])])


if __name__ == "__main__":
    main()
