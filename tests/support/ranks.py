"""Runs a function on N ranks that are processes of this machine.

A server imports torch and megatron-core once (seconds); every call forks its ranks from it (milliseconds), so that each
call has fresh processes, a fresh process group and its own world size. On a GPU, which a forked process cannot use, the
server itself is the one rank of every call.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(device: str = "cpu") -> dict[str, str]:
    """What a rank, or the command line in a test, inherits. On a GPU: FP32 that is FP32, and kernels whose results do
    not depend on the order in which they run, where libraries have a choice."""
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    gpu = {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
           "CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # fmt: skip
    return {
        **os.environ,
        **(gpu if device == "cuda" else {}),
        "SCALE_LLM_TEST_DEVICE": device,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(paths),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


class RanksFailed(AssertionError):
    """A rank failed or none ended in time; the text holds its output."""


class Ranks:
    """Calls functions on ranks; remembers what they returned."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._server: subprocess.Popen | None = None
        self._known: dict[str, list[Any]] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="ranks_")

    def __call__(self, world_size: int, function: str, *, timeout_seconds: float = 400, **arguments) -> list[Any]:
        """What `module:function` returns on each rank, called as function(**arguments); equal calls are made once.

        arguments: plain JSON. Raises RanksFailed with the output of the rank that failed first.
        """
        key = json.dumps([world_size, function, arguments], sort_keys=True)
        if key not in self._known:
            self._known[key] = self.fresh(world_size, function, timeout_seconds=timeout_seconds, **arguments)
        return self._known[key]

    def fresh(self, world_size: int, function: str, *, timeout_seconds: float = 400, **arguments) -> list[Any]:
        """The same, for calls that change files: made every time."""
        import torch

        directory = Path(tempfile.mkdtemp(dir=self._directory.name))
        request = {
            "world_size": world_size,
            "function": function,
            "arguments": arguments,
            "directory": str(directory),
            "port": free_port(),
            "timeout_seconds": timeout_seconds,
        }
        server = self._running_server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise RanksFailed(f"the server of ranks ended with status {server.wait()}")
        failure = json.loads(answer)
        if failure:
            log = (directory / f"rank_{failure['rank']}.log").read_text(errors="replace")
            raise RanksFailed(f"{function} on {world_size} ranks: {failure['how']}\n{log[-6000:]}")
        files = [directory / f"rank_{rank}.pt" for rank in range(world_size)]
        return [torch.load(file, map_location="cpu", weights_only=False) for file in files]

    def _running_server(self) -> subprocess.Popen:
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "support.server"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(self._device),
                cwd=TESTS,
            )  # fmt: skip
        return self._server

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(timeout=30)
        self._directory.cleanup()
