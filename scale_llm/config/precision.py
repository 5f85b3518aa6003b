"""Number formats of the forward and backward passes. Neither bf16 nor fp16: FP32. Field names are Megatron's."""

from dataclasses import dataclass
from enum import Enum


class Fp8Format(Enum):
    e4m3 = "e4m3"
    hybrid = "hybrid"


class Fp8Recipe(Enum):
    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class AmaxAlgorithm(Enum):
    most_recent = "most_recent"
    max = "max"


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    auto: bool = False
    """bf16 where the hardware multiplies it fast (an NVIDIA GPU, a CPU with AMX or AVX-512 BF16), else FP32. Settled
    when the run is composed: config.yaml of a run always holds auto: false and the choice."""
    bf16: bool = False
    """BF16 weights and activations, FP32 main weights and gradient reduction."""
    fp16: bool = False
    """FP16 weights and activations with dynamic loss scaling, FP32 main weights."""
    accumulate_allreduce_grads_in_fp32: bool = True
    initial_loss_scale: float = 4294967296.0
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    """Good steps before the FP16 loss scale doubles."""
    hysteresis: int = 2
    """Overflows before the FP16 loss scale halves."""
    fp8: Fp8Format | None = None
    """The products of linear layers in FP8, from BF16 weights: e4m3 throughout, or hybrid, gradients of activations in
    e5m2. Attention, norms, embedding, output layer and loss stay as they are; so does all of generation."""
    fp8_recipe: Fp8Recipe = Fp8Recipe.delayed
    """What has one scale: a tensor, from what it was in the past (delayed) or is now (tensorwise); 128 or 128 x 128
    numbers (blockwise); 32 numbers (mxfp8)."""
    fp8_margin: int = 0
    """delayed: scales are this power of two smaller than the largest number asks for."""
    fp8_amax_history_len: int = 1
    """delayed: micro-batches of which the largest number is remembered."""
    fp8_amax_compute_algo: AmaxAlgorithm = AmaxAlgorithm.most_recent
    """delayed: which of them sets the scale."""
    first_last_layers_bf16: bool = False
    """The first and last layers of the model stay in BF16. Not with delayed."""
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1


def fp8_unit(precision: PrecisionConfig) -> int:
    """What both sides of a matrix must be divisible by for Transformer Engine to multiply it; 1 without FP8."""
    if precision.fp8 is None:
        return 1
    return 32 if precision.fp8_recipe is Fp8Recipe.mxfp8 else 16
