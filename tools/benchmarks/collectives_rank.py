"""A rank of the benchmark of collectives. Rank 0 prints {operation and size: {contestant: seconds of every round}}.

python -m benchmarks.collectives_rank '{"rounds": 9}'
"""

import json
import os
import sys
import time
from collections.abc import Callable

SIZES = {"a number": 1, "64 KiB": 1 << 15, "512 KiB": 1 << 18, "16 MiB": 1 << 23}
"""Elements of BF16."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = measure(json.loads(sys.argv[1])["rounds"])
    if os.environ["RANK"] == "0":
        print(json.dumps(found), file=answers, flush=True)


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    import torch
    import torch.distributed as dist

    from scale_llm.parallel import collectives
    from scale_llm.parallel.device import start, stop
    from scale_llm.parallel.mesh import MeshSizes, build_mesh

    start("cpu", threads=int(os.environ["OMP_NUM_THREADS"]))
    mesh = build_mesh(MeshSizes(tp=dist.get_world_size()), "gloo")
    assert mesh is not None
    group, ranks = mesh.groups.tp, mesh.sizes.tp
    found = {}
    for size, count in SIZES.items():
        # The same number all over: a thousand sums of it stay a number
        part, whole = torch.zeros(count, dtype=torch.bfloat16), torch.zeros(count * ranks, dtype=torch.bfloat16)
        operations: dict[str, dict[str, Callable]] = {
            "all-reduce": {
                "ours": lambda part=part: collectives.all_reduce(part, group=group),
                "gloo": lambda part=part: dist.all_reduce(part, group=group),
            },
            "all-gather": {
                "ours": lambda part=part, whole=whole: collectives.all_gather_into_tensor(whole, part, group=group),
                "gloo": lambda part=part, whole=whole: collectives.torch_all_gather(whole, part, group=group),
            },
            "reduce-scatter": {
                "ours": lambda part=part, whole=whole: collectives.reduce_scatter_tensor(part, whole, group=group),
                "gloo": lambda part=part, whole=whole: collectives.torch_reduce_scatter(part, whole, group=group),
            },
        }
        for name, contestants in operations.items():
            repeats = max(3, min(200, (1 << 23) // count))
            times: dict[str, list[float]] = {contestant: [] for contestant in contestants}
            for turn in range(rounds + 1):
                for contestant, operation in contestants.items():
                    seconds = torch.tensor(_seconds(operation, repeats))
                    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
                    if turn:  # the first warms up
                        times[contestant].append(float(seconds))
            found[f"{name} of {size}"] = times
    stop()
    return found


def _seconds(operation: Callable, repeats: int) -> float:
    """Of one operation."""
    operation()
    began = time.perf_counter()
    for _ in range(repeats):
        operation()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main()
