"""Starts the ranks of one run on this machine, under torch.distributed's elastic agent.

The agent runs in this process: its log dump is replaced by the failing rank's own last lines, and Ctrl-C waits for
the ranks to save.
"""

import logging
import os
import re
import signal
import socket
import sys
from dataclasses import fields
from typing import Any

from scale_llm.config.cluster import Device
from scale_llm.config.errors import UserError, numbered
from scale_llm.config.run import RunConfig
from scale_llm.launch.environment import rank_variables
from scale_llm.launch.rank import failure_text

SECONDS_TO_SAVE = 60


def launch(cfg: RunConfig) -> int:
    """Run all ranks to their end; returns the exit status (130 after Ctrl-C, as shells have it)."""
    set_environment(cfg)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    command = ["-u", "-m", "scale_llm.launch.rank", cfg.run_dir]
    try:
        elastic_launch(_launch_config(cfg), sys.executable)(*command)
    except ChildFailedError as error:
        return _report(cfg, error.failures)
    except (SignalException, KeyboardInterrupt) as error:
        number = int(getattr(error, "sigval", signal.SIGINT))
        print(
            f"stopped by {signal.Signals(number).name}; the same command resumes {cfg.run_dir}",
            file=sys.stderr,
        )
        return 128 + number
    return 0


def set_environment(cfg: RunConfig) -> None:
    """Variables of the agent and its ranks."""
    os.environ.update(rank_variables(cfg))
    # torch 2.13's shared store keeps the addresses of a dead attempt: half of all restarts over gloo then fail
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SECONDS_TO_SAVE)
    if cfg.cluster.device is Device.cpu:
        # gloo else takes the host name's address, which containers and laptops often cannot reach
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


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
        **({"signals_to_handle": "SIGTERM,SIGINT,SIGHUP"} if _has_field(LaunchConfig, "signals_to_handle") else {}),
    )


def _has_field(cls: type, name: str) -> bool:
    """Fields that newer versions of torch have."""
    return any(field.name == name for field in fields(cls))  # type: ignore[arg-type]


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _report(cfg: RunConfig, failures: dict[int, Any]) -> int:
    """Say what failed first; a UserError as its problems, anything else with the end of that rank's log."""
    rank, failure = first_failure(failures)
    problems = user_problems(failure.message)
    if problems:
        print(numbered(problems), file=sys.stderr)
        return 1
    status = failure.exitcode
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    print(f"\nrank {rank} {how}; {failure_text(cfg.run_dir, rank)}", file=sys.stderr)
    if status == -signal.SIGKILL:
        print("a SIGKILL from outside is most often the machine running out of memory", file=sys.stderr)
    print("the same command resumes from the last checkpoint", file=sys.stderr)
    return status if status > 0 else 1


LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited|remote worker", re.IGNORECASE)


def first_failure(failures: dict[int, Any]) -> tuple[int, Any]:
    """The cause, not its effects: peers lose their connection, and the agent ends the rest with SIGTERM."""

    def order(item: tuple[int, Any]) -> tuple[bool, bool, int]:
        failure = item[1]
        ended = failure.exitcode == -signal.SIGTERM
        return ended, bool(LOST_PEER.search(str(failure.message))), failure.timestamp

    return min(failures.items(), key=order)


def user_problems(message: Any) -> list[str]:
    """The problems of a UserError in a rank's error file; none where it failed otherwise."""
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    name = f"{UserError.__name__}: "
    return text[len(name) :].splitlines() if text.startswith(name) else []
