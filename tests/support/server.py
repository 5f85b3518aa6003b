"""python -m support.server: reads requests, one JSON object a line, and forks ranks for each. See support/ranks.py."""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

ON_GPU = os.environ.get("SCALE_LLM_TEST_DEVICE") == "cuda"


def preload() -> None:
    """Everything a rank imports, in the order that a rank of the program does: megatron-core is adapted first."""
    if ON_GPU:
        return
    from scale_llm.parallel import cpu

    cpu.adapt()
    import torch

    torch.set_num_threads(1)
    for name in ("support.training", "scale_llm.stages.loop", "scale_llm.stages.pretrain", "scale_llm.stages.evaluate",
                 "scale_llm.stages.sft", "scale_llm.stages.reward", "scale_llm.stages.dpo",
                 "scale_llm.stages.policy.stage", "torch._inductor.compile_fx", "torch.utils.tensorboard",
                 "megatron.core.dist_checkpointing"):  # fmt: skip
        importlib.import_module(name)
    from scale_llm.config.io import run_schema
    from scale_llm.config.store import STAGES

    for stage in STAGES.values():  # a rank would make its own for every configuration that it loads
        run_schema(stage)


def rank_main(request: dict, rank: int) -> int:
    """One rank's life; returns its exit status."""
    directory = Path(request["directory"])
    log = os.open(directory / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(request["world_size"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(request["port"]),
    )
    try:
        import torch

        module, name = request["function"].split(":")
        result = getattr(importlib.import_module(module), name)(**request["arguments"])
        torch.save(result, directory / f"rank_{rank}.pt")
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_ranks(request: dict) -> dict | None:
    """Forks the ranks and waits; None, or which rank failed first and how. No rank is left running."""
    running: dict[int, int] = {}
    for rank in range(request["world_size"]):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)  # a group of its own, so that helpers it started end with it
            os._exit(rank_main(request, rank))
        running[pid] = rank
    started = list(running)
    failure = None
    deadline = time.monotonic() + request["timeout_seconds"]
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            rank = running.pop(pid)
            if status and failure is None:
                failure = {"rank": rank, "how": f"rank {rank} ended with status {os.waitstatus_to_exitcode(status)}"}
                deadline = time.monotonic() + 2  # the others may say why, too
        elif time.monotonic() > deadline:
            if failure is None:
                rank = min(running.values())
                failure = {"rank": rank, "how": f"no end after {request['timeout_seconds']} s"}
            for other in running:
                os.kill(other, signal.SIGKILL)
            deadline = time.monotonic() + 5
        else:
            time.sleep(0.005)
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return failure


def run_here(request: dict) -> dict | None:
    """The one rank of a call, in this process; the same answer. A GPU is left empty."""
    assert request["world_size"] == 1, "one GPU"
    status = rank_main(request, 0)
    import torch

    from scale_llm.parallel.device import stop

    stop()
    torch.cuda.set_sync_debug_mode("default")
    gc.collect()
    torch.cuda.empty_cache()
    return {"rank": 0, "how": "it raised"} if status else None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    gc.freeze()  # or garbage collection in a rank would copy the pages that it shares with this process
    gc.set_threshold(20_000, 20, 20)  # as in conftest.py: a rank lives for seconds
    for line in sys.stdin:
        run = run_here if ON_GPU else run_ranks
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
