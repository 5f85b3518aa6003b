"""Phases on this machine or through Slurm, by datatrove's executors."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from scale_llm.config.cluster import ClusterConfig
from scale_llm.config.errors import UserError
from scale_llm.config.machine import detect
from scale_llm.data.files import write_json
from scale_llm.data.progress import count_progress


@dataclass(frozen=True, slots=True)
class Phase:
    """Tasks that may run at once, each over all the steps."""

    name: str
    tasks: int
    steps: list[PipelineStep]


def end_with_this_process() -> None:
    """Has every process that this one forks killed with it (Linux): tasks that outlive a killed run would write into
    the files of the next."""
    if sys.platform == "linux":
        prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
        os.register_at_fork(after_in_child=lambda: prctl(set_death_signal, int(signal.SIGKILL)))


def run_here(phases: list[Phase], logs: Path, tasks: int | None, say: Callable[[str, int, int], None]) -> None:
    """Phase after phase; of each the tasks that are not done yet. say: told its name, tasks left and tasks in all."""
    at_once = tasks or detect().cores
    for phase in phases:
        executor = _Here(
            phase.steps, tasks=phase.tasks, workers=min(at_once, phase.tasks), logging_dir=str(logs / phase.name)
        )  # fmt: skip
        left = executor.get_incomplete_ranks()
        say(phase.name, len(left), phase.tasks)
        if left:
            executor.run_ranks(left, phase.name, logs / phase.name)


class _Here(LocalPipelineExecutor):
    """datatrove's, with another pool: multiprocessing's waits forever for the result of a worker that was killed."""

    def run_ranks(self, ranks: list[int], name: str, logs: Path) -> None:
        """datatrove's lines would bury ours: each task has its log, and what is for the terminal goes to stderr.log."""
        logger.remove()
        logs.mkdir(parents=True, exist_ok=True)
        with count_progress(name, len(ranks), sys.stdout.isatty()) as done, open(logs / "stderr.log", "a") as stream:
            with contextlib.redirect_stderr(stream):
                if self.workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
                    for rank in ranks:
                        self.run_rank(rank)
                        done(1)
                else:
                    self._run_pool(ranks, done)

    def _run_pool(self, ranks: list[int], done: Callable[[int], None]) -> None:
        # Children of a fork have the steps, and datatrove itself, whose import takes most of a second
        pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("fork"))
        try:
            for result in as_completed([pool.submit(self.run_rank, rank) for rank in ranks]):
                result.result()
                done(1)
        except BrokenProcessPool as error:
            raise UserError(
                f"tasks={self.workers}: a task was killed, most likely for want of memory; the same command with fewer "
                "tasks goes on from here"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def run_rank(self, rank: int) -> None:
        """One task, on a copy of the steps, as they keep state."""
        task = copy(self)
        task.pipeline = deepcopy(self.pipeline)
        task._run_for_rank(rank)


class _Slurm(SlurmPipelineExecutor):
    """With the keys of the cluster group; datatrove writes an empty option for a value that is not given."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        arguments = super().get_sbatch_args(max_array)
        flags = {"requeue", *(name for name, value in self._sbatch_args.items() if value == "")}
        del arguments["mem-per-cpu"]  # the cluster's own, where cluster.mem is not given
        return {name: value for name, value in arguments.items() if name in flags or value not in (None, "")}

    def launch_merge_stats(self) -> None:
        """Ours are in the ledgers."""


def submit(phases: list[Phase], logs: Path, tasks: int | None, cluster: ClusterConfig) -> list[str]:
    """A job array for each phase that is not done, after the one before; their ids."""
    if shutil.which("sbatch") is None:
        raise UserError("cluster=slurm: sbatch is not on the PATH; run this where Slurm is, or leave cluster=slurm out")
    record = logs / "jobs.json"
    if alive := _alive(record):
        raise UserError(f"cluster=slurm: jobs {', '.join(alive)} are at work on this output; wait, or scancel them")
    jobs: list[str] = []
    before: SlurmPipelineExecutor | None = None
    for phase in phases:
        executor = _Slurm(
            phase.steps, tasks=phase.tasks, time=cluster.time or "", partition=cluster.partition or "",
            cpus_per_task=cluster.cpus_per_task or 1, workers=tasks or -1, job_name=f"curate-{phase.name}",
            qos=cluster.qos or "", requeue=cluster.requeue, depends=before, sbatch_args=_options(cluster),
            logging_dir=str(logs / phase.name), env_command=_environment(),
        )  # fmt: skip
        if not executor.get_incomplete_ranks():
            continue
        executor.launch_job()
        jobs.append(str(executor.job_id))
        write_json(record, jobs)
        before = executor
    return jobs


def _alive(record: Path) -> list[str]:
    """Of the jobs that an earlier submission wrote down, those that wait or run."""
    if not record.is_file():
        return []
    jobs = ",".join(json.loads(record.read_text()))
    # squeue knows no job that ended long ago, and fails where it knows none of them
    listed = subprocess.run(["squeue", "-h", "-j", jobs, "-o", "%F"], capture_output=True, text=True).stdout
    return sorted(set(listed.split()))


def _options(cluster: ClusterConfig) -> dict[str, str]:
    """Options of sbatch that datatrove has no argument for."""
    given = {name: getattr(cluster, name) for name in ("account", "mem", "constraint", "exclude", "nodelist")}
    options = {name: value for name, value in given.items() if value is not None}
    options["kill-on-invalid-dep"] = "yes"  # what waits for a phase that has failed leaves the queue
    for argument in cluster.sbatch_args:
        name, _, value = argument.removeprefix("--").partition("=")
        options[name] = value
    return options


def _environment() -> str:
    """Tasks find this Python's programs and this checkout."""
    packages = Path(__file__).resolve().parents[2]
    return f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{packages}:$PYTHONPATH"'
