"""How far a run has come."""

import os
import signal
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.parallel import collectives


@dataclass(slots=True)
class Progress:
    """Counted over the whole life of a run, restarts included; saved with every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    nan_iterations: int = 0
    bad_steps: int = 0
    """In a row, up to now, that had a number that is none."""
    high_losses: int = 0
    """In a row, up to now; counted where health.loss_spike_sigmas asks for it."""
    recent_losses: list[float] = field(default_factory=list)
    """Those that were not high, for the same."""
    unlogged_steps: dict[str, int] = field(default_factory=dict)
    """Of each metric, as not every step has all."""
    unlogged_sums: dict[str, float] = field(default_factory=dict)
    """Metrics of the steps since the last log line, so that a resumed run's next line is the uninterrupted run's."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Adds one step to what the next log line averages."""
        for name, value in metrics.items():
            self.unlogged_steps[name] = self.unlogged_steps.get(name, 0) + 1
            self.unlogged_sums[name] = self.unlogged_sums.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        """Means over the steps since the last call; starts anew."""
        means = {name: total / self.unlogged_steps[name] for name, total in self.unlogged_sums.items()}
        self.unlogged_steps, self.unlogged_sums = {}, {}
        return means


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is Slurm's warning before the time limit (cluster.signal)."""


class StopRequest:
    """Whether the run should save and stop: a signal to any rank, or the time limit.

    All ranks must agree at the same iteration, so `agreed` is a collective.
    """

    granted = False
    """Whether a run of this process has stopped because of a signal: its exit status then asks for another start."""

    def __init__(self, host_group: dist.ProcessGroup, minutes: float | None):
        self._group = host_group
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        # Slurm's tasks start with them blocked, so that one that comes before this line waits instead of killing
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _remember(self, number, frame) -> None:
        # A second request means now. Not so after USR1, which announces the TERM of a time limit: the save goes on
        # until KILL.
        if self._signal not in (None, signal.SIGUSR1) and number != signal.SIGUSR1:
            os._exit(128 + number)
        self._signal = number

    def agreed(self) -> str | None:
        """Why all ranks stop after this iteration; None to go on."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        votes = torch.tensor([self._signal or 0, int(late)])
        collectives.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        number, late_votes = votes.tolist()
        if number:
            StopRequest.granted = True
            return f"signal {signal.Signals(number).name}"
        return "train.exit_duration_in_mins is over" if late_votes else None
