"""What Slurm has given this job, from the environment of its batch script."""

from collections.abc import Mapping
from dataclasses import dataclass

from scale_llm.config.cluster import Device
from scale_llm.config.run import RunConfig
from scale_llm.launch.environment import tasks_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    job: str
    restart: int
    """Starts of this job before this one."""
    nodes: int
    node_list: str
    cpus_per_node: int
    """Of the smallest node."""
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    """As asked for."""
    cpus_per_task: int | None = None


def allocation(env: Mapping[str, str]) -> Allocation:
    """The allocation that sbatch or salloc describes."""
    cpus = tasks_per_node(env.get("SLURM_JOB_CPUS_PER_NODE", env.get("SLURM_CPUS_ON_NODE", "1")))
    return Allocation(
        job=env["SLURM_JOB_ID"],
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),
        nodes=int(env.get("SLURM_JOB_NUM_NODES", "1")),
        node_list=env.get("SLURM_JOB_NODELIST", ""),
        cpus_per_node=min(cpus or [1]),
        gpus_per_node=_number(env.get("SLURM_GPUS_ON_NODE")),
        tasks_per_node=_number(env.get("SLURM_NTASKS_PER_NODE")),
        cpus_per_task=_number(env.get("SLURM_CPUS_PER_TASK")),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def fill(cfg: RunConfig, given: set[str], job: Allocation) -> None:
    """Settle what `sbatch --nodes=... slurm/train.sbatch` says of the cluster group and the words do not, in place."""
    cluster = cfg.cluster
    if not {"cluster.nnodes", "cluster.nodes"} & given:
        cluster.nnodes, cluster.nodes = job.nodes, None
    if cluster.gpus_per_node is None:
        cluster.gpus_per_node = job.gpus_per_node
    if cluster.cpus_per_task is None:
        cluster.cpus_per_task = job.cpus_per_task
    if "cluster.nproc_per_node" not in given and (tasks := job.tasks_per_node) is not None:
        cluster.nproc_per_node = tasks


def problems(cfg: RunConfig, job: Allocation) -> list[str]:
    """Ranks that the allocation has no room for."""
    cluster, ranks = cfg.cluster, cfg.cluster.nproc_per_node or 1
    found = []
    if cluster.nnodes > job.nodes:
        found.append(
            f"cluster.nnodes={cluster.nnodes}: job {job.job} has {job.nodes} nodes; submit it with "
            f"sbatch --nodes={cluster.nnodes}, or set cluster.nnodes={job.nodes}"
        )
    cpus = ranks * (cluster.cpus_per_task or 1)
    if cpus > job.cpus_per_node:
        found.append(
            f"cluster.nproc_per_node={ranks}: more ranks than the allocation, which has {job.cpus_per_node} CPUs a "
            f"node where {cpus} are needed; submit it with sbatch --ntasks-per-node={ranks}, or set fewer ranks"
        )
    if cluster.device is Device.cuda and job.gpus_per_node is not None and ranks > job.gpus_per_node:
        found.append(
            f"cluster.nproc_per_node={ranks}: more ranks than the allocation, which has {job.gpus_per_node} GPUs a "
            f"node; submit it with sbatch --gpus-per-node={ranks}, or set fewer ranks"
        )
    return found
