"""Phases on this machine or through Slurm, by datatrove's executors."""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from scale_llm.config.cluster import ClusterConfig
from scale_llm.config.errors import UserError
from scale_llm.config.machine import detect


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


def run_here(phases: list[Phase], logs: Path, tasks: int | None, say: Any) -> None:
    """Phase after phase; of each the tasks that are not done yet."""
    at_once = tasks or detect().cores
    for phase in phases:
        executor = LocalPipelineExecutor(
            phase.steps, tasks=phase.tasks, workers=min(at_once, phase.tasks), logging_dir=str(logs / phase.name),
            # Children of a fork have datatrove already; importing it anew would take each phase a second
            start_method="fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn",
        )  # fmt: skip
        left = len(executor.get_incomplete_ranks())
        say(phase.name, left, phase.tasks)
        if left:
            _quietly(executor, logs / phase.name)


def _quietly(executor: PipelineExecutor, logs: Path) -> None:
    """datatrove's lines and bars would bury ours; each task has its log in `logs`, and the rest goes there, too."""
    logger.remove()
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / "stderr.log", "a") as stream, contextlib.redirect_stderr(stream):
        executor.run()


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
        before = executor
    return jobs


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
