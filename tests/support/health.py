"""Faults that ranks are given in the tests of a run's health."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from scale_llm.parallel.device import start
from scale_llm.parallel.mesh import MeshSizes, build_mesh
from scale_llm.stages.health.straggler_report import StragglerReport
from scale_llm.stages.health.stragglers import Stragglers
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
    check = Stragglers.check

    def becoming_slow(self):
        found = check(self)
        if dist.get_rank() == rank:
            self._matrix = torch.randn(1536, 1536)
        return found

    Stragglers.check = becoming_slow  # type: ignore[method-assign]
    return run(run_dir)


class Kernels:
    """In place of nvidia-resiliency-ext's manager of CUPTI: one kernel of this rank, `seconds` long in every pass."""

    def __init__(self, seconds: float, fails: bool):
        self._seconds, self._fails, self._passes = seconds, fails, 0

    def start_profiling(self) -> None:
        if self._fails:
            raise RuntimeError("CUPTI_ERROR_NOT_READY")

    def stop_profiling(self) -> None:
        self._passes += 1

    def get_results(self) -> dict[str, SimpleNamespace]:
        one = self._seconds
        times = SimpleNamespace(min=one, max=one, median=one, avg=one, stddev=0.0, num_calls=self._passes)
        return {"gemm": times} if self._passes else {}

    def reset_results(self) -> None:
        self._passes = 0


def kernels_reported(fails: bool) -> tuple[list, dict | None]:
    """(what each of two ranks is said to have taken, the lowest scores), of kernels that last twice as long on rank 1.
    fails: its CUPTI does not start."""
    start("cpu", threads=1)
    mesh = build_mesh(MeshSizes(dp=2), "gloo")
    assert mesh is not None
    rank = dist.get_rank()
    report = StragglerReport(mesh.host_group, Kernels(1.0 + rank, fails and rank == 1))
    with report.watched():
        pass
    scores = report.scores([0.1, 0.1, 0.1])
    return ([], None) if scores is None else (scores.times(), scores.lowest())
