"""Number formats of the forward and backward passes. Both false: FP32. Field names are Megatron's."""

from dataclasses import dataclass


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
