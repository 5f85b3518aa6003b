"""A job of a benchmark: processes that meet on this machine's CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_TOOLS = Path(__file__).resolve().parents[1]


def on_ranks(module: str, ranks: int, settings: dict[str, Any]) -> Any:
    """Runs `python -m MODULE SETTINGS` on that many ranks, two threads over all of them; what rank 0 prints, as JSON.

    Raises:
        RuntimeError: a rank has failed.
    """
    path = os.pathsep.join([str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    shared = {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(max(1, 2 // ranks)), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "THP_MEM_ALLOC_ENABLE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", module, json.dumps(settings)]
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        output, _ = processes[0].communicate()
        if any([process.wait() for process in processes]):
            raise RuntimeError(f"{' '.join(command)} failed")
    finally:
        for process in processes:
            process.kill()
    return json.loads(output)
