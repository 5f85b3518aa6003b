"""A job of a benchmark: processes that meet on this machine's CPUs."""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_TOOLS = Path(__file__).resolve().parents[1]


def on_ranks(module: str, ranks: int, settings: dict[str, Any]) -> Any:
    """Runs `python -m MODULE SETTINGS` on that many ranks, two threads over all of them; what rank 0 prints, as JSON.

    Raises:
        RuntimeError: a rank has failed.
    """
    with Job(module, ranks, settings) as job:
        return job.answer()


class Job:
    """The same, for jobs that take turns: rank 0 reads a line for each turn and answers with one of JSON."""

    def __init__(self, module: str, ranks: int, settings: dict[str, Any]):
        path = os.pathsep.join([str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH", "")])
        shared = {
            **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(max(1, 2 // ranks)), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "THP_MEM_ALLOC_ENABLE": "1",
        }  # fmt: skip
        self._command = [sys.executable, "-m", module, json.dumps(settings)]
        self._processes = [
            subprocess.Popen(
                self._command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def turn(self) -> Any:
        """Has it do its part once; what it answers."""
        pipe = self._processes[0].stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # it has ended: no answer comes
            pipe.write("go\n")
            pipe.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line of rank 0."""
        pipe = self._processes[0].stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} failed")
        return json.loads(line)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        """Rank 0 reads the end of its lines, and all end."""
        try:
            if error is None:
                self._processes[0].communicate()
                if any([process.wait() for process in self._processes]):
                    raise RuntimeError(f"{' '.join(self._command)} failed")
        finally:
            for process in self._processes:
                process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
