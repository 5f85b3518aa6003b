"""The job script of one run: sbatch's options from the cluster group; the body, slurm/job.sh, is the same for all."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scale_llm.config.cluster import ClusterConfig
from scale_llm.config.names import run_name
from scale_llm.config.run import RunConfig

SCRIPT = "job.sbatch"


def scripts_dir() -> Path:
    """slurm/ of the checkout, or scale_llm_slurm where a wheel put it."""
    checkout = Path(__file__).resolve().parents[3] / "slurm"
    if (checkout / "job.sh").is_file():
        return checkout
    spec = importlib.util.find_spec("scale_llm_slurm")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the package scale_llm_slurm (slurm/ of the repository) is not installed")
    return Path(list(spec.submodule_search_locations)[0])


def render(cfg: RunConfig) -> str:
    """The text of <run_dir>/job.sbatch for a resolved configuration."""
    run_dir = os.path.abspath(cfg.run_dir)
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# One run of scale_llm, configured by config.yaml beside this file: sbatch it to start or resume.",
            *[f"#SBATCH {option}" for option in options(cfg, run_dir)],
            "set -euo pipefail",
            f"python={shlex.quote(sys.executable)}",
            f"scripts={shlex.quote(str(scripts_dir()))}",
            f"run_dir={shlex.quote(run_dir)}",
            '. "$scripts/job.sh"',
            "",
        ]
    )


def options(cfg: RunConfig, run_dir: str) -> list[str]:
    """sbatch's options in the order of its manual; what is left open is left to the cluster."""
    cluster = cfg.cluster
    log = run_dir.replace("%", "%%") + "/logs/job-%j.out"
    given = {
        "job-name": run_name(cfg),
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "nodes": cluster.nnodes + cluster.spare_nodes,
        "ntasks-per-node": cluster.nproc_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "gpus-per-node": cluster.gpus_per_node,
        "mem": cluster.mem,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "nodelist": cluster.nodelist,
        "signal": cluster.signal,
        "chdir": os.getcwd(),  # where relative paths of config.yaml begin, wherever sbatch is called
        "output": log,
        "open-mode": "append",  # a requeued job writes on in the same file
    }
    lines = [f"--{name}={_quoted(value)}" for name, value in given.items() if value is not None]
    if cluster.spare_nodes:
        lines.append("--no-kill")  # a node that dies leaves the job to the others
    return [*lines, "--requeue" if cluster.requeue else "--no-requeue", *cluster.sbatch_args]


def _quoted(value: str | int) -> str:
    """sbatch reads its lines as a shell would, quotes and backslashes included."""
    text = str(value)
    if not any(letter in text for letter in " &|;'#\"\\"):
        return text
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'


def srun_arguments(cluster: ClusterConfig, nodes: Sequence[str] = ()) -> list[str]:
    """Options of the srun that starts one task for each rank. nodes: which, where the job has others; none: all."""
    per_node = cluster.nproc_per_node or 1
    arguments = [
        f"--nodes={cluster.nnodes}",
        f"--ntasks={cluster.nnodes * per_node}",
        f"--ntasks-per-node={per_node}",
    ]
    if nodes:
        arguments.append(f"--nodelist={','.join(nodes)}")
    if cluster.cpus_per_task is not None:  # since 22.05 srun no longer takes it from sbatch
        arguments.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.gpus_per_node is not None:
        # Every rank sees all GPUs of its node and takes its own by LOCAL_RANK: NCCL's peer-to-peer needs to see them
        arguments.append("--gpu-bind=none")
    return [*arguments, *cluster.srun_args]
