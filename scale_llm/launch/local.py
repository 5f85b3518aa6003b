"""Starts the ranks of one run on this machine, under torch.distributed's elastic agent.

The agent runs in this process: its log dump is replaced by the failing rank's own last lines, and Ctrl-C waits for
the ranks to save.
"""

import logging
import os
import signal
import socket
import sys
from dataclasses import fields
from pathlib import Path

from scale_llm.config.run import RunConfig
from scale_llm.launch.rank import log_path

SECONDS_TO_SAVE = 60
LINES_SHOWN = 15


def launch(cfg: RunConfig) -> int:
    """Run all ranks to their end; returns the exit status (130 after Ctrl-C, as shells have it)."""
    _environment(cfg)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    command = ["-u", "-m", "scale_llm.launch.rank", cfg.run_dir]
    try:
        elastic_launch(_launch_config(cfg), sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _report(cfg, rank, failure)
    except (SignalException, KeyboardInterrupt) as error:
        number = int(getattr(error, "sigval", signal.SIGINT))
        print(
            f"stopped by {signal.Signals(number).name}; the same command resumes {cfg.run_dir}",
            file=sys.stderr,
        )
        return 128 + number
    return 0


def _environment(cfg: RunConfig) -> None:
    """Variables that ranks inherit and must have before they import torch."""
    os.environ["OMP_NUM_THREADS"] = str(cfg.cluster.omp_num_threads)
    # torch 2.13's shared store keeps the addresses of a dead attempt: half of all restarts over gloo then fail
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SECONDS_TO_SAVE)
    if cfg.cluster.device.value == "cpu":
        # gloo else takes the host name's address, which containers and laptops often cannot reach
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _launch_config(cfg: RunConfig):
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=cfg.cluster.nproc_per_node or 1,
        run_id=f"scale-llm-{os.getpid()}",
        role="rank",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0, "timeout": 900},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        **(
            {"signals_to_handle": "SIGTERM,SIGINT,SIGHUP"}
            if _has_field(LaunchConfig, "signals_to_handle")
            else {}
        ),
    )


def _has_field(cls: type, name: str) -> bool:
    """Fields that newer versions of torch have."""
    return any(field.name == name for field in fields(cls))  # type: ignore[arg-type]


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _report(cfg: RunConfig, rank: int, failure) -> int:
    """Say which rank failed first and show the end of its log."""
    path = log_path(cfg.run_dir, rank)
    status = failure.exitcode
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    on_terminal = rank == (cfg.cluster.nproc_per_node or 1) - 1
    print(f"\nrank {rank} {how}; its log is {path}", file=sys.stderr)
    if not on_terminal or status < 0:
        print(_tail(path), file=sys.stderr)
    if status == -signal.SIGKILL:
        print("SIGKILL from outside is most often the machine running out of memory", file=sys.stderr)
    print("the same command resumes from the last checkpoint", file=sys.stderr)
    return status if status > 0 else 1


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(f"  {line}" for line in lines[-LINES_SHOWN:])
