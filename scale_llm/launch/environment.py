"""Which ranks there are: started by us, or already there under torchrun or srun. No torch."""

import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from scale_llm.config.cluster import Device
from scale_llm.config.run import RunConfig

LOOPBACK = ("lo", "lo0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """This process is one rank of a job that something else started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    starter: str
    """torchrun or srun, for messages."""

    @property
    def nnodes(self) -> int:
        return max(1, self.world_size // max(1, self.local_world_size))

    def variables(self) -> dict[str, str]:
        """What torch.distributed's env:// reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def quiet_imports() -> None:
    """torch says that pynvml, which nvidia-resiliency-ext asks for, has another name now; that is no news for a run."""
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)


def rank_variables(cfg: RunConfig) -> dict[str, str]:
    """What a rank, or the process that it is forked from, must find in its environment before it imports torch."""
    variables = {"OMP_NUM_THREADS": str(cfg.cluster.omp_num_threads)}
    if "THP_MEM_ALLOC_ENABLE" not in os.environ:
        # torch asks for huge pages: a fork copies a page's entry, and background saves fork (checkpoint/forked.py)
        variables["THP_MEM_ALLOC_ENABLE"] = "1"
    if cfg.cluster.device is Device.cuda and "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ:
        # One hardware queue keeps collectives of tensor parallelism ahead of the kernels they overlap with
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    fp32 = not (cfg.precision.bf16 or cfg.precision.fp16)
    if cfg.cluster.device is Device.cuda and fp32 and "NVIDIA_TF32_OVERRIDE" not in os.environ:
        # Transformer Engine's products of FP32 are TF32 otherwise, of 10 bits
        variables["NVIDIA_TF32_OVERRIDE"] = "0"
    return variables


def joined(env: Mapping[str, str] | None = None) -> Joined | None:
    """The rank that torchrun or srun made this process; None: this process starts the ranks itself."""
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    # A batch script has SLURM_PROCID=0 too, but is no task of a step
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _slurm_tasks(env) > 1:
        return task_of_srun(env)
    return None


def _from_torchrun(env: Mapping[str, str]) -> Joined:
    world = int(env["WORLD_SIZE"])
    return Joined(
        rank=int(env["RANK"]),
        world_size=world,
        local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", world)),
        master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(env.get("MASTER_PORT", 29500)),
        starter="torchrun",
    )


def _slurm_tasks(env: Mapping[str, str]) -> int:
    return int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))


def task_of_srun(env: Mapping[str, str]) -> Joined:
    """The rank of a task that srun started, also where it is the only one."""
    nodes = expand_hostlist(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1")))
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    per_node = tasks_per_node(tasks) or [_slurm_tasks(env)]
    node = int(env.get("SLURM_NODEID", 0))
    # Two jobs on one node must not share a port; requeues of one job come after each other
    port = 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000
    return Joined(
        rank=int(env["SLURM_PROCID"]),
        world_size=_slurm_tasks(env),
        local_rank=int(env.get("SLURM_LOCALID", 0)),
        local_world_size=per_node[min(node, len(per_node) - 1)],
        master_addr=env.get("MASTER_ADDR", nodes[0]),
        master_port=int(env.get("MASTER_PORT", port)),
        starter="srun",
    )


def cores_of_task(join: Joined | None, cores: int, env: Mapping[str, str]) -> int | None:
    """Cores that srun has given to this rank alone, of those that it may run on; None: ranks of its node share them.

    A variable of sbatch may promise more than srun has given, and without binding every task may run on all cores.
    """
    if join is None or join.starter != "srun":
        return None
    if asked := env.get("SLURM_CPUS_PER_TASK"):
        return min(int(asked), cores)
    return cores if cores < int(env.get("SLURM_CPUS_ON_NODE", "0")) else None


def start_name(join: Joined, env: Mapping[str, str]) -> str:
    """The same on all ranks of a start. No two starts by srun share it; two by torchrun at one port may, whose address
    nodes may name in several ways."""
    if join.starter == "srun":
        return f"{env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_RESTART_COUNT', '0')}.{env.get('SLURM_STEP_ID', '0')}"
    return f"{join.master_port} {env.get('TORCHELASTIC_RUN_ID', '')}"


def interface_towards(host: str, port: int) -> str | None:
    """The network interface of this machine that leads to a host; None where it cannot be told."""
    import psutil

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram socket: chooses the way and sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own for address in addresses):
            return name
    return None


def network_variables(join: Joined, *, cuda: bool) -> dict[str, str]:
    """The interface that leads to the other nodes, for the libraries that would take the host name's (gloo) or the
    first that they find (NCCL, for its handshake)."""
    interface = interface_towards(join.master_addr, join.master_port)
    if interface is None or (interface in LOOPBACK and join.nnodes > 1):  # its own name for itself leads nowhere else
        return {}
    # A host name that is 127.0.1.1 to its own node: NCCL leaves the loopback out and finds the others
    nccl = cuda and interface not in LOOPBACK
    names = ["GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if nccl else [])]
    return {name: interface for name in names if name not in os.environ}


def environment_of(cfg: RunConfig, join: Joined) -> dict[str, str]:
    """What a rank that this process becomes finds."""
    network = network_variables(join, cuda=cfg.cluster.device is Device.cuda)
    return {**os.environ, **join.variables(), **rank_variables(cfg), **network}


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, one number a node: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found:
            counts += [int(found.group(1))] * int(found.group(2) or 1)
    return counts


def expand_hostlist(text: str) -> list[str]:
    """Slurm's short form of host names: `n[1-2,05],m7` is n1, n2, n05, m7."""
    hosts: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        hosts += _expand_one(part)
    return hosts


def _expand_one(part: str) -> list[str]:
    found = re.search(r"\[([^\]]*)\]", part)
    if found is None:
        return [part]
    before, after = part[: found.start()], part[found.end() :]
    names: list[str] = []
    for piece in found.group(1).split(","):
        first, _, last = piece.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        names += [f"{before}{number:0{len(first)}d}{after}" for number in numbers]
    return [host for name in names for host in _expand_one(name)]
