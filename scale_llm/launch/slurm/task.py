"""One task of srun becomes one rank. Ranks never compose: they read <run_dir>/config.yaml.

That file was resolved where the job was submitted, for a node of which nothing was known: layout, paths, device and
threads are settled there, and what only a node knows (its kernels: model.compile_ops, precision.auto on a CPU) is open.
The first task settles it with its own machine, writes the file back and prepares the data; the others wait for that, so
all ranks agree. A later start of the run finds nothing open and keeps what the first has decided, whatever its nodes.
"""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from scale_llm.config.errors import UserError
from scale_llm.config.exit_status import REQUEUE
from scale_llm.config.io import CONFIG_FILE, load_config, to_yaml, write_text
from scale_llm.config.machine import Machine, detect
from scale_llm.config.resolve import resolve
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import UntrainedStageConfig
from scale_llm.config.validate import machine_problems
from scale_llm.launch.environment import Joined, environment_of, start_name, task_of_srun
from scale_llm.launch.join import READY, marked, wait_until_ready
from scale_llm.launch.lock import take

SECONDS_FOR_THE_DYING = 60
"""Ranks of the start before, on a node that Slurm has lost, may still be writing: wait for their lock so long."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
ERROR_FILES = "logs/error_rank_{rank}.json"


def become_rank(run_dir: Path) -> NoReturn:
    """Replace this process by its rank, so that Slurm's signals reach the rank itself."""
    cfg, join = load_config(run_dir), task_of_srun(os.environ)
    saves = not isinstance(cfg.stage, UntrainedStageConfig)
    _answer_signals(saves)
    error_file = run_dir / ERROR_FILES.format(rank=join.rank)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(error_file)  # where `job end` finds why a rank failed
    _meet(cfg, run_dir, join)
    command = [sys.executable, "-u", "-m", "scale_llm.launch.rank", str(run_dir), "--joined", "--job"]
    if saves:
        # From here the kernel keeps a signal, as a mask survives exec, until the rank's StopRequest asks for it
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execve(sys.executable, command, environment_of(cfg, join))


def _answer_signals(saves: bool) -> None:
    """Before there is anything to save a signal just ends the task; what has no state may not die of a warning."""
    if not saves:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(REQUEUE))


def _meet(cfg: RunConfig, run_dir: Path, join: Joined) -> None:
    """The first task makes the run ready, the others wait. The mark is of this start alone."""
    start = start_name(join, os.environ)
    if join.rank > 0:
        wait_until_ready(run_dir / READY, start, join)
        return
    from scale_llm.launch.runs import open_run

    with marked(run_dir / READY, start):
        take(run_dir, wait_seconds=SECONDS_FOR_THE_DYING, inheritable=True)
        open_run(settle(cfg, run_dir, detect()))


def settle(cfg: RunConfig, run_dir: Path, machine: Machine) -> RunConfig:
    """What this node decides, written into config.yaml; resolving leaves alone what is settled already."""
    settled = resolve(cfg, machine)
    if problems := machine_problems(settled, machine):
        raise UserError(problems)
    if settled != cfg:
        write_text(run_dir / CONFIG_FILE, to_yaml(settled))
    return settled
