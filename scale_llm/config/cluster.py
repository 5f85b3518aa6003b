"""Where the ranks run."""

from dataclasses import dataclass
from enum import Enum


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    nnodes: int = 1
    nproc_per_node: int | None = None
    """Ranks per node; None: the GPUs of this machine, or on a CPU as many as the layout needs."""
    device: Device = Device.auto
    omp_num_threads: int | None = None
    """Threads of a CPU rank; None: the cores of this machine divided by its ranks."""
