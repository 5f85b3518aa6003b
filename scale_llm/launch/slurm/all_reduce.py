"""One all-reduce over all nodes of a job, a task a node: python -m scale_llm.launch.slurm.all_reduce GPUS_PER_NODE

Prints one line, `NODE ok reduced ...` or `NODE bad REASON`. Every task first signs a list that the first one keeps, so
that a node that never came is named, not those that wait for it. preflight.sh reads the lines.
"""

import datetime
import os
import sys
import time

from scale_llm.launch.environment import Joined, network_variables, task_of_srun

SECONDS = 60
MEGABYTES = 64


def main() -> None:
    gpus = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    join, node = task_of_srun(os.environ), os.environ.get("SLURMD_NODENAME", "node")
    try:
        print(f"{node} ok {reduce(join, node, gpus)}", flush=True)
    except Exception as error:
        print(f"{node} {_words(error)}", flush=True)
        os._exit(1)
    os._exit(0)  # peers may be gone: tearing down would wait for them


def reduce(join: Joined, node: str, gpus: int) -> str:
    """What the reduction did; raises Absent or Wrong, or what the library raises."""
    os.environ.update(network_variables(join, cuda=gpus > 0))
    import torch
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=SECONDS)
    store = dist.TCPStore(join.master_addr, join.master_port, join.world_size, join.rank == 0, timeout, False)
    _sign(store, join, node)
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    backend = "nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=join.rank, world_size=join.world_size, timeout=timeout)
    numbers = torch.full((MEGABYTES * 2**18,), float(join.rank + 1), device=device)
    dist.all_reduce(numbers[:1].clone())  # the first opens connections
    began = time.perf_counter()
    dist.all_reduce(numbers)
    wrong = int((numbers != join.world_size * (join.world_size + 1) / 2).sum())
    seconds = time.perf_counter() - began
    if wrong:
        raise Wrong(f"{wrong} of {numbers.numel()} sums are wrong")
    return f"reduced {MEGABYTES} MiB over {join.world_size} nodes by {backend} in {seconds * 1000:.0f} ms"


class Wrong(Exception):
    """This node has got wrong sums."""


class Absent(Exception):
    """Other nodes have not come; this one is well."""


def _sign(store, join: Joined, node: str) -> None:
    store.set(f"node/{join.rank}", node)
    deadline = time.monotonic() + SECONDS
    missing = list(range(join.world_size))
    while missing:
        missing = [rank for rank in missing if not store.check([f"node/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise Absent(f"waited {SECONDS} s for {len(missing)} of {join.world_size} nodes")
        time.sleep(0.1)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"ok {text}" if isinstance(error, Absent) else f"bad {type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
