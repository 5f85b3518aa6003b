"""Ranks on CPUs, forked from one process that has imported what they need: a start costs the imports once, not once a
rank, and a start after a failure costs none. A forked process cannot use CUDA, so ranks on GPUs start by themselves.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from scale_llm.launch import rank as rank_program

_UNKNOWN = 255
"""What multiprocessing gives as exit status when the fork server has ended without saying one."""


class ForkedContext(SubprocessContext):
    """torch's elastic context of processes, where a process is forked. args: rank -> (run directory,)."""

    def _start(self) -> None:
        for rank in range(self.nprocs):
            process = ForkedProcess(self.args[rank][0], {**os.environ, **self.envs[rank]})
            self.subprocess_handlers[rank] = ForkedHandler(rank, process)  # type: ignore[assignment]


class ForkedProcess:
    """A rank, with what subprocess.Popen has of a process."""

    def __init__(self, run_dir: str, environment: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_rank, args=(run_dir, environment))
        with _nothing_to_run_again():
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self._server: psutil.Process | None = None
        with suppress(psutil.Error):  # it has ended already
            self._server = psutil.Process(self.pid).parent()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """Its exit status. If the process that it was forked from was killed, so was it, and its own is not known."""
        status = self._process.exitcode
        return -signal.SIGKILL if status == _UNKNOWN and self._server_is_gone() else status

    def _server_is_gone(self) -> bool:
        try:
            return self._server is not None and self._server.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return status


class ForkedHandler:
    """What torch's context calls to end a process, and all that it has started."""

    def __init__(self, rank: int, process: ForkedProcess):
        self.local_rank_id, self.proc = rank, process

    def close(self, death_sig: signal.Signals | None = None) -> None:
        try:
            os.killpg(self.proc.pid, death_sig or signal.SIGTERM)
        except ProcessLookupError:  # it has ended, or has no group of its own yet, and then nothing to save either
            with suppress(ProcessLookupError):
                os.kill(self.proc.pid, signal.SIGKILL)


@contextmanager
def _nothing_to_run_again() -> Iterator[None]:
    """Processes started meanwhile do not begin by running the main program of this one, as multiprocessing has it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _rank(run_dir: str, environment: dict[str, str]) -> None:
    """The life of a forked rank."""
    for number in rank_program.STOP_SIGNALS:  # first: what comes to its group would be passed over, as by the server
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    rank_program.die_with_parent()
    launcher = multiprocessing.parent_process()
    if launcher is None or not launcher.is_alive():  # and so ended before this rank was bound to its end
        os._exit(1)
    multiprocessing.set_start_method(None, force=True)  # that of other programs, in code that a user brings
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [rank_program.__file__, run_dir]
    rank_program.main()


def start_forked(run_dir: str, environments: dict[int, dict[str, str]], logs_specs: Any) -> ForkedContext:
    """One rank for every environment, started."""
    context = ForkedContext(
        name="rank", entrypoint="a rank", args=dict.fromkeys(environments, (run_dir,)), envs=environments,
        logs_specs=logs_specs,
    )  # fmt: skip
    try:
        context.start()
    except BaseException:
        context.close(signal.SIGKILL)
        raise
    return context
