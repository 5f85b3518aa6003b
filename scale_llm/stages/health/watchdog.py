"""Ends this rank when the run makes no progress, so that its launcher can start all ranks again.

Each kind of work has a limit of its own, which is learnt: three times the longest of its last twenty, and some slack.
One rank that hangs has all the others wait for it, so every rank finds it and leaves what it was doing in its log. The
time that a process was stopped does not count: a job that Slurm suspends has not hung.
"""

import faulthandler
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, NoReturn

from scale_llm.config.run import RunConfig

POLL_SECONDS = 0.2
FACTOR = 3.0
LEARNT_FROM = 20
"""Latest pieces of work of a kind."""

SECONDS_FOR_PYTHON = 15
"""Beyond the limit for the thread below to run; where C code keeps Python's lock, faulthandler's own thread ends it."""


class Hang(RuntimeError):
    """No progress within the limit."""


class NoWatchdog:
    """Where nothing is watched. beat: called when a piece of work begins, for a launcher that watches itself."""

    def __init__(self, beat: Callable[[], None] | None = None):
        self._beat = beat

    def start(self) -> None: ...

    def enter(self, work: str, iteration: int) -> None:
        """This piece of work begins, and the one before has ended."""
        if self._beat is not None:
            self._beat()

    def close(self) -> None: ...


class Watchdog(NoWatchdog):
    """hung: called with the Hang after the stacks are in the log; it does not return.

    first_seconds: the limit of work that has not been seen before.
    """

    def __init__(
        self, log: IO[str], hung: Callable[[Exception], NoReturn], *, slack_seconds: float, first_seconds: float,
        beat: Callable[[], None] | None = None,
    ):  # fmt: skip
        super().__init__(beat)
        self._log, self._hung = log, hung
        self._slack, self._first = slack_seconds, first_seconds
        self._seen: dict[str, deque[float]] = {}
        self._work, self._iteration = "start", 0
        self._began, self._waited, self._wait_limit = time.monotonic(), 0.0, first_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def enter(self, work: str, iteration: int) -> None:
        super().enter(work, iteration)
        now = time.monotonic()
        self._seen.setdefault(self._work, deque(maxlen=LEARNT_FROM)).append(now - self._began)
        self._work, self._iteration = work, iteration
        self._began, self._waited = now, 0.0
        self._wait_limit = self.limit(work)

    def limit(self, work: str) -> float:
        """Seconds that a piece of this work may take."""
        seen = self._seen.get(work)
        return self._first if not seen else FACTOR * max(seen) + self._slack

    def close(self) -> None:
        """Watches no more."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        before, armed = time.monotonic(), 0.0
        while not self._stop.wait(POLL_SECONDS):
            now = time.monotonic()
            # Longer than a few polls: this process was stopped, or its machine
            self._waited += min(now - before, 10 * POLL_SECONDS)
            before = now
            if now - armed > SECONDS_FOR_PYTHON / 3:
                left = max(self._wait_limit - self._waited, 0.0) + SECONDS_FOR_PYTHON
                faulthandler.dump_traceback_later(left, exit=True, file=self._log)
                armed = now
            if self._waited > self._wait_limit:
                self._end()

    def _end(self) -> None:
        said = f"{self._work} after iteration {self._iteration} has taken {self._waited:.1f} s, the limit is "
        self._log.write(f"no progress: {said}{self._wait_limit:.1f} s; what every thread is doing:\n")
        self._log.flush()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(file=self._log, all_threads=True)
        # Its first line is the same every time, so that hangs at one iteration are known as alike
        self._hung(Hang(f"no progress in {self._work}\n{said}{self._wait_limit:.1f} s"))


def watchdog_of(cfg: RunConfig, log: IO[str] | None, hung: Callable[[Exception], NoReturn] | None) -> NoWatchdog:
    """The watchdog that a run asks for. Where nothing has been learnt yet, as much as a collective may wait."""
    beat = heartbeat()
    if not cfg.health.hang_detection or log is None or hung is None:
        return NoWatchdog(beat)
    slack, first = cfg.health.hang_slack_seconds or 60.0, 60.0 * cfg.parallel.distributed_timeout_minutes
    return Watchdog(log, hung, slack_seconds=slack, first_seconds=first, beat=beat)


def heartbeat() -> Callable[[], None] | None:
    """Tells NVIDIA's ft_launcher (nvidia-resiliency-ext), where it has started this rank, that the rank is alive."""
    if "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ:
        return None
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    return client.send_heartbeat
