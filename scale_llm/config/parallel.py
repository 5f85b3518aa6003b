"""The layout: how one model and its batch lie on the ranks. Field names are Megatron's."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank of the interleaved schedule; None: the plain 1F1B schedule."""
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """None: tensor_model_parallel_size."""
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    distributed_timeout_minutes: int = 10
    """How long a collective may wait for a rank before the job fails."""
