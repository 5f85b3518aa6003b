"""Where the time and the memory of a few steps go: traces, NVTX ranges, memory snapshots."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    start: int | None = None
    """Iterations that are done when the profile begins, as Megatron's profile_step_start: start=10 stop=12 profiles
    iterations 11 and 12, with what they evaluate and save. None: no profile."""
    stop: int | None = None
    """The last iteration of the profile. A run that resumes after it profiles nothing."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks of the whole job that are profiled, each into files of its own."""
    record_shapes: bool = True
    """Shapes of every operation's inputs."""
    with_stack: bool = False
    """Python's stack at every operation of torch's trace, which is slower and many times larger then; the table of
    operations is left out."""
    nvtx: bool = False
    """In place of torch's trace: NVTX ranges and cudaProfilerStart and Stop, for nsys profile
    --capture-range=cudaProfilerApi. One of the two, as CUPTI serves one profiler at a time. GPUs alone."""
    memory: bool = False
    """Every allocation with its stack, and what is held at the end (or when memory runs out), for
    pytorch.org/memory_viz. GPUs alone."""
