"""Whether communication can overlap with computation as it is asked to."""

from scale_llm.config.cluster import Device
from scale_llm.config.model import Backend
from scale_llm.config.optim import Optimizer
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import EvaluateConfig, PretrainConfig


def overlap_problems(cfg: RunConfig) -> list[str]:
    """Keys that need others, or another layout, device or stage."""
    return [*_optimizer(cfg), *_buckets(cfg), *_pipeline(cfg), *_tensor(cfg)]


def _optimizer(cfg: RunConfig) -> list[str]:
    layout = cfg.parallel
    if layout.use_distributed_optimizer and cfg.optim.optimizer is Optimizer.sgd:
        return [
            "parallel.use_distributed_optimizer=true, optim.optimizer=sgd: megatron-core's distributed optimizer is "
            "Adam or AdamW; set optim=adamw or parallel.use_distributed_optimizer=false"
        ]
    if not layout.overlap_param_gather:
        return []
    lacking = [key for key in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(layout, key)]
    if not lacking:
        return []
    remedy = " ".join(f"parallel.{key}=true" for key in lacking)
    return [f"parallel.overlap_param_gather=true: works only together with {' and '.join(lacking)}; set {remedy}"]


def _buckets(cfg: RunConfig) -> list[str]:
    layout, found = cfg.parallel, []
    if layout.ddp_bucket_size is not None and not layout.overlap_grad_reduce:
        found.append(
            f"parallel.ddp_bucket_size={layout.ddp_bucket_size}: without parallel.overlap_grad_reduce all gradients "
            "are reduced at once; set parallel.overlap_grad_reduce=true, or leave it null"
        )
    if layout.ddp_pad_buckets_for_high_nccl_busbw and not layout.use_distributed_optimizer:
        found.append(
            "parallel.ddp_pad_buckets_for_high_nccl_busbw=true: is for parallel.use_distributed_optimizer=true; set "
            "it, or leave this false"
        )
    return found


def _pipeline(cfg: RunConfig) -> list[str]:
    layout = cfg.parallel
    if not layout.overlap_p2p_comm or (layout.virtual_pipeline_model_parallel_size or 1) > 1:
        return []
    return [
        "parallel.overlap_p2p_comm=true: only the interleaved schedule has it; set "
        "parallel.virtual_pipeline_model_parallel_size=2 or more, or leave it false"
    ]


def _tensor(cfg: RunConfig) -> list[str]:
    layout, key = cfg.parallel, "parallel.tp_comm_overlap=true"
    if not layout.tp_comm_overlap:
        return []
    if cfg.cluster.device is Device.cpu:
        return [f"{key}: needs NVIDIA GPUs and Transformer Engine; set parallel.tp_comm_overlap=false"]
    found = []
    if cfg.model.backend in (Backend.torch, Backend.local):
        found.append(f"{key}: is of Transformer Engine's layers, this is model.backend={cfg.model.backend.value}; set "
                     "model.backend=transformer_engine, or tp_comm_overlap=false")  # fmt: skip
    if not layout.sequence_parallel:
        found.append(f"{key}: needs parallel.sequence_parallel=true, and tensor parallelism; set both")
    if not isinstance(cfg.stage, PretrainConfig | EvaluateConfig):
        found.append(f"{key}: needs micro-batches of one shape, which stage={cfg.stage.name} has not; set it to false")
    per_node, tp = cfg.cluster.nproc_per_node or 1, layout.tensor_model_parallel_size
    if per_node % tp:
        found.append(f"{key}: needs the ranks of one tensor-parallel group in one node, and "
                     f"cluster.nproc_per_node={per_node} is not divisible by {tp}; set another layout")  # fmt: skip
    return found
