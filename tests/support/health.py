"""Faults that ranks are given in the tests of a run's health."""

import torch
import torch.distributed as dist

from scale_llm.stages.health.stragglers import Slow, Stragglers
from scale_llm.stages.pretrain import Pretrain
from support.stage import run


def run_with_flipped_bits(run_dir: str, iterations: list[int], rank: int) -> dict:
    """The stage, where before these iterations one bit of one weight of a rank is flipped, each time once."""
    step, left = Pretrain.step, list(iterations)

    def flipping(self, consumed_samples: int, size: int):
        if left and consumed_samples == (left[0] - 1) * size:
            left.pop(0)
            if dist.get_rank() == rank:
                flip(next(self.engine.modules[0].parameters()))
        return step(self, consumed_samples, size)

    Pretrain.step = flipping
    try:
        return {"problems": run(run_dir), "error": None}
    except RuntimeError as error:
        return {"problems": [], "error": f"{type(error).__name__}: {error}"}


def flip(weight: torch.Tensor) -> None:
    """The lowest bit of the mantissa of the first element."""
    with torch.no_grad():
        weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def run_with_slow_rank(run_dir: str, rank: int) -> list[str]:
    """The stage, where the matrices that one rank multiplies are larger from the second time on, as if it had become
    slower."""
    slow_ranks = Stragglers.slow_ranks

    def becoming_slow(self) -> list[Slow]:
        found = slow_ranks(self)
        if dist.get_rank() == rank:
            self._matrix = torch.randn(1536, 1536)
        return found

    Stragglers.slow_ranks = becoming_slow  # type: ignore[method-assign]
    return run(run_dir)
