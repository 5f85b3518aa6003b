"""The straggler report of nvidia-resiliency-ext: each rank's speed as a part of the best rank's, and of its own best.

It is fed with the rounds of work that every rank times alone (stragglers.py) and, on a GPU for which the package's
CUPTI module is installed, with the kernels of the step before. Its Detector is not used: it wants CUPTI for the first.
"""

import math
import socket
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from scale_llm.parallel.device import Device

WORK = "products and copies"
SCORES = ["relative_perf_scores", "individual_perf_scores"]
STATISTICS_KEPT = 8192
"""Times of one kernel that CUPTI's module keeps."""
OWN_BEST = "at its own best"
BEST_KERNELS = "the fastest rank's kernels"
OWN_KERNELS = "its own kernels at their best"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Speeds, 0 to 1, by rank; no kernels: none were seen."""

    relative: dict[int, float]
    individual: dict[int, float]
    kernels_relative: dict[int, float]
    kernels_individual: dict[int, float]

    def times(self) -> list[tuple[int, str, float]]:
        """(rank, compared with what, how many times as long it took). The fastest rank's work is left out: the median
        of all is the better measure, and is there without this package."""
        named = {OWN_BEST: self.individual, BEST_KERNELS: self.kernels_relative, OWN_KERNELS: self.kernels_individual}
        return [(rank, name, 1 / score) for name, scores in named.items() for rank, score in scores.items()]

    def lowest(self) -> dict[str, float | int]:
        """Each score's lowest and whose it is, for the timeline."""
        named = {"relative": self.relative, "individual": self.individual,
                 "kernels_relative": self.kernels_relative, "kernels_individual": self.kernels_individual}  # fmt: skip
        found: dict[str, float | int] = {}
        for name, scores in named.items():
            if scores:
                rank = min(scores, key=lambda rank: scores[rank])
                found |= {name: round(scores[rank], 3), f"{name}_rank": rank}
        return found


class StragglerReport:
    """Remembers each rank's best times. kernels: CUPTI's manager of the package, started."""

    def __init__(self, group: dist.ProcessGroup, kernels: Any = None):
        from nvidia_resiliency_ext.straggler.reporting import ReportGenerator

        self._generator = ReportGenerator(SCORES, gather_on_rank0=True, pg=group, node_name=socket.gethostname())
        self._kernels = kernels

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Kernels that are launched in it are timed."""
        if self._kernels is None:
            yield
            return
        try:
            self._kernels.start_profiling()
        except RuntimeError as error:
            self._without_kernels(error)
            yield
            return
        try:
            yield
        finally:
            try:
                self._kernels.stop_profiling()
            except RuntimeError as error:
                self._without_kernels(error)

    def _without_kernels(self, error: RuntimeError) -> None:
        """A report that is no more than good to have ends no run."""
        self._kernels = None
        print(f"straggler report: CUPTI sees no kernels ({error})", flush=True)

    def scores(self, seconds: list[float]) -> Scores | None:
        """Of the rounds of this rank and the kernels since the last call; None but on rank 0. A collective."""
        from nvidia_resiliency_ext.straggler import Statistic

        work = {
            Statistic.MIN: min(seconds), Statistic.MAX: max(seconds), Statistic.MED: statistics.median(seconds),
            Statistic.AVG: statistics.mean(seconds), Statistic.STD: statistics.stdev(seconds),
            Statistic.NUM: len(seconds),
        }  # fmt: skip
        report = self._generator.generate_report({WORK: work}, self._kernel_statistics())
        if report is None:
            return None
        return Scores(
            relative=_known(report.section_relative_perf_scores[WORK]),
            individual=_known(report.section_individual_perf_scores[WORK]),
            kernels_relative=_known(report.gpu_relative_perf_scores),
            kernels_individual=_known(report.gpu_individual_perf_scores),
        )

    def _kernel_statistics(self) -> dict[str, dict]:
        from nvidia_resiliency_ext.straggler import Statistic

        if self._kernels is None:
            return {}
        found = {
            name: {
                Statistic.MIN: one.min, Statistic.MAX: one.max, Statistic.MED: one.median, Statistic.AVG: one.avg,
                Statistic.STD: one.stddev, Statistic.NUM: one.num_calls,
            }
            for name, one in self._kernels.get_results().items()
        }  # fmt: skip
        self._kernels.reset_results()
        return found


def _known(scores: Any) -> dict[int, float]:
    return {rank: score for rank, score in scores.items() if not math.isnan(score)}


def straggler_report(device: Device, group: dist.ProcessGroup, *, sees_kernels: bool) -> StragglerReport | None:
    """None where any rank lacks the package. A collective; sees_kernels: no other profiler has CUPTI."""
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, _is_installed(), group=group)
    if not all(told):
        return None
    return StragglerReport(group, _kernel_times() if sees_kernels and device.is_cuda else None)


def _is_installed() -> bool:
    try:
        import nvidia_resiliency_ext.straggler.reporting  # noqa: F401
    except ImportError:
        return False
    return True


def _kernel_times() -> Any:
    """CUPTI's manager of the package; None where its module was not built, does not load or finds another profiler."""
    from nvidia_resiliency_ext.straggler.cupti import CuptiManager

    try:
        kernels = CuptiManager(statsMaxLenPerKernel=STATISTICS_KEPT)
        kernels.initialize()
    except (ImportError, RuntimeError) as error:
        print(f"straggler report: CUPTI sees no kernels ({error})", flush=True)
        return None
    return kernels
