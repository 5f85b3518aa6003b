"""Which signals a rank saves on, and what a second one does."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys
if "blocked" in sys.argv:  # as a task of Slurm starts: before any thread, which would take the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    os.kill(os.getpid(), signal.SIGUSR1)
import torch.distributed as dist
from scale_llm.stages.progress import StopRequest
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
stop = StopRequest(dist.group.WORLD, None)
for name in sys.argv[1:]:
    if name != "blocked":
        os.kill(os.getpid(), getattr(signal, name))
print(stop.agreed(), StopRequest.granted, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("signals", "status", "said"),
    [
        ([], 0, "None False"),
        (["SIGUSR1"], 0, "signal SIGUSR1 True"),
        (["SIGUSR1", "SIGTERM"], 0, "signal SIGTERM True"),  # the limit comes: the save has until KILL
        (["SIGTERM", "SIGUSR1"], 0, "signal SIGUSR1 True"),
        (["SIGTERM", "SIGTERM"], 143, ""),
        (["SIGUSR1", "SIGINT", "SIGINT"], 130, ""),
        (["blocked"], 0, "signal SIGUSR1 True"),
    ],
)
def test_signals(signals, status, said):
    result = subprocess.run([sys.executable, "-c", SCRIPT, *signals], capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert result.stdout.strip() == said
