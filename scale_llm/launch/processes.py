"""The ranks of one start on this machine: processes of torch.distributed's elastic package, watched and ended together.

Its agent is not used: after a failure it waits half a minute for the others, and one that is stopped never answers.
"""

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from typing import Any

import psutil

from scale_llm.config.cluster import Device
from scale_llm.config.exit_status import HUNG
from scale_llm.config.run import RunConfig
from scale_llm.launch.environment import Joined
from scale_llm.launch.rank import STACKS

SECONDS_TO_SAVE = 60
"""For ranks that were asked to stop."""

SECONDS_TO_FAIL = 3.0
"""For the others once one rank has failed: they have lost a peer, and what they say of it is kept."""

POLL_SECONDS = 0.05

PRELOADED = "scale_llm.launch.preload"
"""Module that the process imports from which ranks are forked."""

COMPILER = "torch._inductor.compile_fx"
"""The same, for ranks that compile."""

UNBUFFERED = "PYTHONUNBUFFERED"
"""Variable that Python reads as it starts; the ranks inherit what it did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the ranks of one start have ended.

    failures: rank -> torch's ProcessFailure, without those that were ended because of another; none: all is well.
    silent: ranks that the others had waited for, of a hang.
    """

    failures: dict[int, Any] = field(default_factory=dict)
    silent: tuple[int, ...] = ()


def prepare_start(cfg: RunConfig) -> None:
    """Begin with what takes long in a start of ranks, beside what this process does before it needs them."""
    if _can_fork(cfg):
        compiler = [COMPILER] if cfg.model.compile_ops else []
        multiprocessing.set_forkserver_preload([PRELOADED, *compiler])
        before = os.environ.get(UNBUFFERED)
        os.environ[UNBUFFERED] = "1"  # what a rank prints is in its log when the rank is killed
        try:
            forkserver.ensure_running()
        finally:
            os.environ.pop(UNBUFFERED)
            if before is not None:
                os.environ[UNBUFFERED] = before


def run_ranks(cfg: RunConfig, asked: Sequence[int] = ()) -> Outcome:
    """Start all ranks and wait for their end.

    asked: signals that came before, and that nothing was made of; torch's handlers see later ones.

    Raises:
        SignalException: this process was asked to stop, and so were the ranks, which have saved.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    count, port = cfg.cluster.nproc_per_node or 1, free_port()
    environments = {rank: _place(rank, count, port).variables() for rank in range(count)}
    with tempfile.TemporaryDirectory(prefix="scale_llm_ranks_") as directory:
        logs = DefaultLogsSpecs(log_dir=directory)
        if _can_fork(cfg):
            from scale_llm.launch.forked_ranks import start_forked

            context = start_forked(cfg.run_dir, environments, logs)
        else:
            command = ("-u", "-m", "scale_llm.launch.rank", cfg.run_dir)
            arguments = dict.fromkeys(environments, command)
            context = start_processes("rank", sys.executable, arguments, environments, logs)
        try:
            if asked:
                raise SignalException("asked to stop before", sigval=signal.Signals(asked[0]))
            return _watch(context)
        except SignalException as stop:
            _forward_signals(context)
            context.close(death_sig=signal.Signals(stop.sigval), timeout=SECONDS_TO_SAVE)
            raise
        except BaseException:
            context.close(death_sig=signal.SIGKILL)
            raise


def _can_fork(cfg: RunConfig) -> bool:
    """Whether ranks are forked from one process: not where they use CUDA, nor where forks are not safe."""
    return cfg.cluster.device is Device.cpu and sys.platform == "linux"


def _place(rank: int, count: int, port: int) -> Joined:
    return Joined(
        rank=rank, world_size=count, local_rank=rank, local_world_size=count, master_addr="127.0.0.1",
        master_port=port, starter="",
    )  # fmt: skip


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forward_signals(context) -> None:
    """A second Ctrl-C means now: the ranks know what to do with it."""

    def forward(number: int, frame) -> None:
        for handler in context.subprocess_handlers.values():
            _send(handler.proc, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)


def _watch(context) -> Outcome:
    processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    while True:
        codes = {rank: process.poll() for rank, process in processes.items()}
        if any(codes.values()):
            silent, killed = _end_the_rest(processes, hung=HUNG in codes.values())
            result = context.wait(0)
            failures = {rank: one for rank, one in result.failures.items() if rank not in killed}
            return Outcome(failures=failures, silent=tuple(silent))
        if None not in codes.values():
            context.wait(0)
            return Outcome()
        time.sleep(POLL_SECONDS)


def _end_the_rest(processes: dict[int, Any], *, hung: bool) -> tuple[list[int], list[int]]:
    """(ranks that others had waited for, ranks that had to be killed)."""
    left = {rank: process for rank, process in processes.items() if process.poll() is None}
    stopped = [rank for rank, process in left.items() if _is_stopped(process.pid)]
    for process in left.values():
        _send(process, signal.SIGCONT)
        if hung:
            _send(process, STACKS)
    deadline = time.monotonic() + SECONDS_TO_FAIL
    # One that was stopped has been asked what it did, and has nothing else to say
    waited = [process for rank, process in left.items() if rank not in stopped]
    time.sleep(0.2 if hung else 0.0)
    while time.monotonic() < deadline and any(process.poll() is None for process in waited):
        time.sleep(POLL_SECONDS)
    killed = [rank for rank, process in left.items() if process.poll() is None]
    for rank in killed:
        with suppress(ProcessLookupError):
            os.killpg(left[rank].pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            left[rank].wait(SECONDS_TO_FAIL)
    return (sorted({*stopped, *killed}) if hung else []), killed


def _send(process, number: int) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(process.pid, number)


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
