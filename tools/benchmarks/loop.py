"""What the loop adds to a step: data, logging, metrics, the vote on stopping. Run as a process of its own:

python -m benchmarks.loop THREADS     prints {"step": seconds, "loop": seconds beyond it}, medians over the iterations

The real loop, stage, data and log; only clocks are added.
"""

import json
import os
import sys
import tempfile
import time
from statistics import median

ITERATIONS = 24
WARM_UP = 4


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(directory, sys.argv[1])), file=answers)


def measure(directory: str, threads: str) -> dict[str, float]:
    """Seconds of a step in the engine, and of everything between two of them."""
    from benchmarks.common import alone
    from benchmarks.train_contestants import BATCH
    from scale_llm.launch.runs import compose_run, open_run

    planned = compose_run(
        [
            "model=llama_32m", f"run_dir={directory}", f"train.train_iters={ITERATIONS}", "train.eval_iters=0",
            f"train.micro_batch_size={BATCH}", f"train.global_batch_size={BATCH}", "cluster=local_cpu",
            "cluster.nproc_per_node=1", f"cluster.omp_num_threads={threads}", "data.embedded_megabytes=4",
        ]
    )  # fmt: skip
    open_run(planned.cfg)
    alone()
    from scale_llm.stages.context import start_rank
    from scale_llm.stages.loop import train
    from scale_llm.stages.pretrain import Pretrain

    run = start_rank(planned.cfg)
    stage = Pretrain(run)
    begun: list[float] = []
    steps: list[float] = []
    loading: list[float] = []
    step, load = stage.engine.train_step, stage._loader.global_batch

    def timed_step(batches, *arguments, **keywords):
        begun.append(time.perf_counter())
        result = step(batches, *arguments, **keywords)
        steps.append(time.perf_counter() - begun[-1])
        return result

    def timed_load(*arguments):
        start = time.perf_counter()
        batches = list(load(*arguments))
        loading.append(time.perf_counter() - start)
        return iter(batches)

    stage.engine.train_step, stage._loader.global_batch = timed_step, timed_load
    train(run, stage)
    between = [b - a - s for a, b, s in zip(begun, begun[1:], steps, strict=False)]
    return {"step": median(steps[WARM_UP:]), "loop": median(between[WARM_UP:])}


if __name__ == "__main__":
    main()
