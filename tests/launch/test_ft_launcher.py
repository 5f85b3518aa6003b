"""Under ft_launcher (nvidia-resiliency-ext) ranks tell it that they are alive, and it starts again what hangs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.ranks import environment
from support.runs import latest

pytest.importorskip("nvidia_resiliency_ext.fault_tolerance", reason="pip install scale-llm[resilience]")


@pytest.mark.slow
def test_a_stopped_rank_is_found_by_its_heartbeats(runs, tmp_path):
    """Our own watchdog is off. Before its first heartbeat a rank has ten minutes: what is found is one that ceased."""
    launcher = [str(Path(sys.executable).with_name("ft_launcher")), "--nproc-per-node", "2", "--max-restarts", "2"]
    limits = ["--ft-param-initial_rank_heartbeat_timeout", "600", "--ft-param-rank_heartbeat_timeout", "6"]
    words = runs.words(tmp_path, "cluster.nproc_per_node=2", "checkpoint.save_interval=5", "train.train_iters=60",
                       "train.eval_interval=null", "health.hang_detection=false")  # fmt: skip
    process = subprocess.Popen(
        [*launcher, *limits, "-m", "scale_llm.launch.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    log, deadline = tmp_path / "logs" / "rank_1.log", time.monotonic() + 100
    while not (tmp_path / "checkpoints" / "iter_0000005").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-2000:]
        time.sleep(0.01)
    os.kill(int(log.read_text().split(" pid ")[1].split()[0]), signal.SIGSTOP)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output[-3000:]
    assert latest(tmp_path) == 60 and "resumed at iteration" in log.read_text()
