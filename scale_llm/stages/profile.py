"""The profile of a few iterations: when it begins and ends, on which ranks, and where its files lie."""

import functools
import sys
from pathlib import Path

import torch.distributed as dist

from scale_llm.config.batch import total_iterations
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import UntrainedStageConfig
from scale_llm.parallel.device import Device
from scale_llm.parallel.profilers import Profiler, profilers
from scale_llm.parallel.ranges import show_ranges
from scale_llm.stages.health.watchdog import NoWatchdog


class NoProfile:
    """Where none is asked for."""

    def after(self, iteration: int) -> list[str]:
        """So many iterations are done; remarks for the log. Every rank says so alike."""
        return []

    def close(self) -> None:
        """The run ends, maybe with an error."""


class Profile(NoProfile):
    """Of one process: once it is over there is no other, also where the run goes back to an older checkpoint."""

    def __init__(self, cfg: RunConfig, device: Device, host_group: dist.ProcessGroup, watchdog: NoWatchdog):
        wanted, self._device, self._rank = cfg.profile, device, dist.get_rank()
        assert wanted.start is not None and wanted.stop is not None, "validated"
        self._wanted, self._group, self._watchdog = wanted, host_group, watchdog
        self._train = cfg.train
        self._directory = Path(cfg.run_dir) / "profile"
        self._watches = self._rank in wanted.ranks
        self._running: list[Profiler] = []
        self._first: int | None = None  # iteration of the profile
        self._last, self._over = 0, False

    def after(self, iteration: int) -> list[str]:
        self._last = iteration
        if self._over:
            return []
        if self._first is None:
            return self._begin(iteration) if self._wanted.start <= iteration < self._stop else []
        if iteration < self._stop:
            return []
        self._watchdog.enter("the profile", iteration)
        return self._together(self._end())

    @functools.cached_property
    def _stop(self) -> int:
        """The last iteration; asked for in the loop, when that of the run is known too."""
        return min(self._wanted.stop, total_iterations(self._train))

    def close(self) -> None:
        if self._first is not None and not self._over:  # without the other ranks: they may be gone
            for remark in self._end():
                print(remark, file=sys.stderr, flush=True)

    def _begin(self, iteration: int) -> list[str]:
        self._watchdog.enter("the profile", iteration)
        self._first, remarks = iteration + 1, []
        if self._watches:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._start()
            except Exception as error:  # of a disk, of a profiler: neither is a reason to end a run
                remarks = [f"no profile of rank {self._rank}: {error}"]
        return self._together(remarks)

    def _start(self) -> None:
        wanted = self._wanted
        for profiler in profilers(
            self._device, record_shapes=wanted.record_shapes, with_stack=wanted.with_stack, nvtx=wanted.nvtx,
            memory=wanted.memory,
        ):  # fmt: skip
            profiler.start()
            self._running.append(profiler)
        show_ranges(True)

    def _end(self) -> list[str]:
        """Writes what there is; remarks."""
        self._over, remarks = True, []
        path = self._directory / f"rank_{self._rank:05d}_iterations_{self._first}_to_{self._last}"
        show_ranges(False)
        while self._running:
            try:
                files = self._running.pop().stop(path)
                remarks += [f"profile of iterations {self._first} to {self._last}: {file}" for file in files]
            except Exception as error:
                remarks.append(f"a part of the profile of rank {self._rank} is not written: {error}")
        return remarks

    def _together(self, remarks: list[str]) -> list[str]:
        """All ranks' remarks. To start and to write takes seconds, in which the others wait here and not in a step,
        where they would be taken for hanging."""
        told: list[list[str]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(told, remarks, group=self._group)
        return [remark for part in told for remark in part]


def profile_of(cfg: RunConfig, device: Device, host_group: dist.ProcessGroup, watchdog: NoWatchdog) -> NoProfile:
    """The profile that a run asks for."""
    if cfg.profile.start is None or isinstance(cfg.stage, UntrainedStageConfig):
        return NoProfile()
    return Profile(cfg, device, host_group, watchdog)
