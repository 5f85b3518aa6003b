"""Whether there is something to profile, and whether this device can be."""

from scale_llm.config.cluster import Device
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import UntrainedStageConfig
from scale_llm.config.validate_layout import world_size


def profile_problems(cfg: RunConfig) -> list[str]:
    """Problems of a profile that is asked for."""
    if cfg.profile.start is None or isinstance(cfg.stage, UntrainedStageConfig):
        return []
    return [*_iterations(cfg, cfg.profile.start), *_ranks(cfg), *_device(cfg)]


def _iterations(cfg: RunConfig, start: int) -> list[str]:
    stop, last = cfg.profile.stop, cfg.train.train_iters
    if start < 0:
        return [f"profile.start={start}: is a number of iterations that are done; give 0 or more"]
    if stop is None or stop <= start:
        return [
            f"profile.stop={'null' if stop is None else stop}: the profile is of iterations profile.start + 1 = "
            f"{start + 1} to profile.stop; set profile.stop={start + 2}"
        ]
    if last is not None and start >= last:
        return [
            f"profile.start={start}: the run ends with iteration {last} (train.train_iters); give a number below {last}"
        ]
    return []


def _ranks(cfg: RunConfig) -> list[str]:
    ranks, world = cfg.profile.ranks, world_size(cfg)
    if ranks and len(set(ranks)) == len(ranks) and all(0 <= rank < world for rank in ranks):
        return []
    return [f"profile.ranks={ranks}: not ranks of this run, each once; give numbers from 0 to {world - 1}, such as [0]"]


def _device(cfg: RunConfig) -> list[str]:
    if cfg.cluster.device is not Device.cpu:
        return []
    what = {
        "nvtx": "NVTX ranges are for Nsight Systems, which looks at GPUs; without it torch's trace has the same names",
        "memory": "torch records allocations of GPUs alone; on a CPU run under a profiler of memory such as memray",
    }
    return [
        f"profile.{key}=true: {reason}; set profile.{key}=false, or cluster.device=cuda"
        for key, reason in what.items()
        if getattr(cfg.profile, key)
    ]
