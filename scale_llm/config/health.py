"""What a run watches itself for, and what it does about it. Restarts are in the cluster group."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class HealthConfig:
    max_nan_steps: int = 3
    """Steps in a row whose loss or gradient is no number. Each leaves weights and random numbers as they were; after so
    many the run goes back to its newest good checkpoint and leaves out the samples since."""
    max_rewinds: int = 3
    """Returns to a checkpoint without a new one in between; one more ends the run. 0: the first ends it."""
    loss_spike_sigmas: float | None = None
    """A loss is high where it is so many standard deviations above the median of recent ones; None: not looked for.
    The deviation is that of the middle half, which a spike does not widen."""
    loss_spike_window: int = 100
    """Recent steps that a loss is compared with; none is high before as many are there."""
    loss_spike_steps: int = 3
    """High losses in a row that send the run back to the checkpoint before them, without the samples since."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Iterations between comparisons of the weights' checksums over data- and context-parallel replicas, and one before
    every save; None: never. Where they differ the run goes back to its last checkpoint."""
    straggler_interval: int | None = None
    """Iterations between timings of the same products and copies on every rank; None: never. Where
    nvidia-resiliency-ext is installed its straggler report is made of them; in pretraining also of the kernels of the
    step before, where it has CUPTI."""
    straggler_factor: float = 1.5
    """A rank that takes so many times as long as the median (or, by that report, as at its own best, or its kernels as
    the fastest rank's), twice in a row, is named with its host."""
    hang_detection: bool = True
    """End a rank that makes no progress, with what every thread was doing in its log; its launcher starts all again."""
    hang_slack_seconds: float | None = None
    """A step may take three times the longest of the last twenty, and this. None: 8 s, but 60 s on Slurm and where
    steps are not all of one shape, as kernels may then be compiled in the middle."""
    drill_nan_gradients: list[int] = field(default_factory=list)
    """A drill: iterations at which one gradient of the first rank is made NaN, as by a defective GPU."""
