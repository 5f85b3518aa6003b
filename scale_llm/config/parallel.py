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
    ddp_bucket_size: int | None = None
    """Parameters whose gradients are reduced, and whose weights are gathered, at a time while others are computed;
    None: 40 million, or a million for each data-parallel rank."""
    ddp_pad_buckets_for_high_nccl_busbw: bool = False
    """Buckets of the distributed optimizer end at multiples of 2^16, at which NCCL is faster over many ranks."""
    overlap_p2p_comm: bool = False
    """Activations go from stage to stage of the interleaved schedule while others are computed."""
    tp_comm_overlap: bool = False
    """Tensor-parallel collectives within the matrix products that they belong to, by Transformer Engine's user
    buffers. For one shape of micro-batches, and tensor parallelism inside a node."""
    distributed_timeout_minutes: int = 10
    """How long a collective may wait for a rank before the job fails."""
