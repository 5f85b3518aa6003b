"""A save that goes on while the run does: first every rank's part, then what makes a checkpoint of them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from scale_llm.checkpoint.forked import Forked
from scale_llm.checkpoint.part_writer import Written


class Publishing:
    """What rank 0 does when all parts are written, in a thread: a disk may take its time over small files too. On other
    ranks there is nothing to do."""

    def __init__(self, action: Callable[[], None] | None):
        self.problem: str | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._action is not None:
                self._action()
        except Exception as error:  # noqa: BLE001 - told by every rank when they look
            self.problem = f"{type(error).__name__}: {error}"

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)


@dataclass(slots=True)
class Asked:
    """A question to all ranks that is on its way. totals: of [goes on, has a problem], once `work` is done; problem: of
    this rank when it asked."""

    work: dist.Work
    totals: torch.Tensor
    problem: str | None


@dataclass(slots=True)
class Pending:
    """A save that goes on in the background."""

    iteration: int
    write_index: Callable[[list[Written]], None]
    part: Forked[Written]
    publishing: Publishing | None = None
    asked: Asked | None = None

    def is_alive(self) -> bool:
        return (self.publishing or self.part).is_alive()

    def wait(self, seconds: float) -> None:
        (self.publishing or self.part).wait(seconds)

    def problem(self) -> str | None:
        """Of what is no longer alive."""
        if self.is_alive():
            return None
        return self.part.problem() if self.publishing is None else self.publishing.problem
