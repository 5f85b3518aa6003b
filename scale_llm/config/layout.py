"""Where the roles of stage=ppo and stage=grpo lie: which ranks, and how each model is cut over them."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class RoleLayout:
    """A size that is null is the parallel group's."""

    ranks: str | None = None
    """`all`, `first_half`, `second_half`, or numbers such as `0-3,6`; null: the actor's, and the actor's are all."""
    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int | None = None
    expert_model_parallel_size: int | None = None
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool | None = None
    offload: bool = False
    """Weights, gradients and optimizer state go to host memory while the role has nothing to do."""


@dataclass(kw_only=True, slots=True)
class LayoutConfig:
    """The parallel group gives the sizes of every role that has none of its own."""

    actor: RoleLayout = field(default_factory=RoleLayout)
    rollout: RoleLayout = field(default_factory=RoleLayout)
    """Generation. On the actor's ranks and cut like it, it is the actor itself; else the actor's weights are moved."""
    reference: RoleLayout = field(default_factory=RoleLayout)
    critic: RoleLayout = field(default_factory=RoleLayout)
    reward: RoleLayout = field(default_factory=RoleLayout)
    bucket_megabytes: float = 256.0
    """Weights that are moved at once."""
    checksum: bool = False
    """Compare the weights on both sides after every movement."""
