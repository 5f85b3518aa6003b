"""How far a run has come."""

import os
import signal
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist


@dataclass(slots=True)
class Progress:
    """Counted over the whole life of a run, restarts included; saved with every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    nan_iterations: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class StopRequest:
    """Whether the run should save and stop: a signal to any rank, or the time limit.

    All ranks must agree at the same iteration, so `agreed` is a collective.
    """

    def __init__(self, host_group: dist.ProcessGroup, minutes: float | None):
        self._group = host_group
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, frame) -> None:
        if self._signal is not None:  # a second request means now
            os._exit(128 + number)
        self._signal = number

    def agreed(self) -> str | None:
        """Why all ranks stop after this iteration; None to go on."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        votes = torch.tensor([self._signal or 0, int(late)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        number, late_votes = votes.tolist()
        if number:
            return f"signal {signal.Signals(number).name}"
        return "train.exit_duration_in_mins is over" if late_votes else None
