"""How long to train, on how much at a time. Field names are Megatron's."""

from dataclasses import dataclass, field
from enum import Enum


class RecomputeGranularity(Enum):
    none = "none"
    selective = "selective"
    full = "full"


class RecomputeMethod(Enum):
    uniform = "uniform"
    block = "block"


class CudaGraphImpl(Enum):
    none = "none"
    local = "local"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    micro_batch_size: int = 1
    """Samples in one forward pass of one data-parallel rank."""
    global_batch_size: int = 8
    """Samples in one optimizer step over all ranks."""
    rampup_batch_size: list[int] | None = None
    """[start samples, increment, ramp-up samples]: the global batch size grows linearly from start to
    global_batch_size while that many samples are consumed."""
    train_iters: int | None = None
    train_samples: int | None = None
    train_epochs: float | None = None
    """Passes over the training conversations (sft). Exactly one of train_iters, train_samples and train_epochs."""
    eval_interval: int | None = None
    """Iterations between evaluations on the validation split; None: only at the end."""
    eval_iters: int = 10
    """Global batches per evaluation; 0: none."""
    exit_interval: int | None = None
    """Save and stop at the first iteration divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes."""
    iterations_to_skip: list[int] = field(default_factory=list)
    """Iterations whose samples are left out: they are counted, and nothing is trained on them."""
    seed: int = 1234
    log_interval: int = 1
    """Iterations between log lines, TensorBoard points and rows of metrics.jsonl; the first one is always logged."""
    recompute_granularity: RecomputeGranularity = RecomputeGranularity.none
    """Activations computed again in the backward pass: none, attention only (selective), whole layers (full)."""
    recompute_method: RecomputeMethod = RecomputeMethod.uniform
    recompute_num_layers: int = 1
    cuda_graph_impl: CudaGraphImpl = CudaGraphImpl.none
    """local: the forward and the backward pass of each layer are one launch, which pays where kernels are short. For
    pretraining with model.backend=torch and data parallelism alone. Weight gradients are then not fused, and a second
    copy of the layers' own stays in memory."""
