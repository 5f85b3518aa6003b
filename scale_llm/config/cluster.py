"""Where the ranks run."""

from dataclasses import dataclass, field
from enum import Enum

MOST_RANKS = 2**24
"""Of one job: more is a slip of the pen, and no list of them would fit into memory."""


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Launcher(Enum):
    local = "local"
    slurm = "slurm"


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    launcher: Launcher = Launcher.local
    """local: ranks on this machine; slurm: a job, which sbatch is given."""
    nnodes: int = 1
    nproc_per_node: int | None = None
    """Ranks per node; None: the GPUs of this machine, or on a CPU as many as the layout needs."""
    device: Device = Device.auto
    omp_num_threads: int | None = None
    """Threads of a CPU rank; None: the cores of this machine divided by its ranks, on Slurm cpus_per_task, under srun
    the cores of its task."""
    # What follows is for launcher: slurm, under sbatch's own names
    nodes: int | None = None
    """Slurm's name of nnodes."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit of one start as sbatch takes it: minutes, hours:minutes:seconds, days-hours; None: the partition's."""
    gpus_per_node: int | None = None
    """Also the ranks per node; None: a job on CPUs."""
    cpus_per_task: int | None = None
    """Cores of a rank; None: the cluster's default, most often 1."""
    mem: str | None = None
    """Memory of a node, such as 500G; 0: all of it."""
    constraint: str | None = None
    exclude: str | None = None
    """Nodes to leave out: n[3-4],n9."""
    nodelist: str | None = None
    requeue: bool = True
    """Requeue after a signal (time limit, preemption), a lost node, or a failure that another start may not meet."""
    max_restarts: int | None = None
    """Restarts after failures in the life of one job or one launch; those after signals are not counted. None: 10 on
    Slurm, 3 here. Three ends alike at the same iteration are the last in any case."""
    spare_nodes: int = 0
    """Nodes of the job beyond nnodes, which wait to take the place of one that fails."""
    signal: str = "USR1@300"
    """USR1 to the ranks, and seconds before the time limit: they save and the job is requeued. Slurm may send it a
    minute early."""
    preflight: bool = True
    """Check every node (GPUs, disk, an all-reduce over all) before the ranks start."""
    sbatch_args: list[str] = field(default_factory=list)
    """Further lines for the head of the job script: [--exclusive,'--mail-type=END']."""
    srun_args: list[str] = field(default_factory=list)
    """Further options of the srun that starts the ranks: ['--container-image=IMAGE']."""
