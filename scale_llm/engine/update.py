"""The optimizer's step on gradients that are still sums over tokens.

Dividing by the number of tokens and by the clipping factor are two passes over all gradients; torch's fused optimizers
divide by `grad_scale` while they read them anyway, so here both are one number and no pass. Optimizers without it
(Apex's and Transformer Engine's) get the passes.
"""

import math
from dataclasses import dataclass

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from scale_llm.engine.optimizer import parts


@dataclass(frozen=True, slots=True)
class Update:
    """grad_norm: of the mean gradient, before clipping. done: False where nothing was changed: FP16 gradients
    overflowed, or the norm is no number."""

    done: bool
    grad_norm: float | None = None
    num_zeros: float | None = None


@torch.no_grad()
def update(optimizer: MegatronOptimizer, *, tokens: float, clip_grad: float, count_zeros: bool) -> Update:
    """One step of every part. tokens: what the gradients are to be divided by; clip_grad: 0 for no clipping."""
    if _overflowed(optimizer):
        return Update(done=False)
    grad_norm = float(optimizer.get_grad_norm()) / tokens
    if not math.isfinite(grad_norm):
        return Update(done=False, grad_norm=grad_norm)
    num_zeros = sum(part.count_zeros() for part in parts(optimizer)) if count_zeros else None
    # Megatron's rule: norms a millionth below the limit are scaled as well.
    divisor = tokens * max(1.0, (grad_norm + 1.0e-6) / clip_grad if clip_grad > 0 else 1.0)
    for part in parts(optimizer):
        if part.optimizer is not None:
            _divide(part, divisor)
    optimizer.step_with_ready_grads()
    return Update(done=True, grad_norm=grad_norm, num_zeros=num_zeros)


def _overflowed(optimizer: MegatronOptimizer) -> bool:
    """Hands the gradients to the optimizer, in its precision and without the loss's scale; whether any of them is no
    number. The scale moves once, by what was found in all parts, where megatron-core moves it after each of them."""
    members = [part for part in parts(optimizer) if getattr(part, "grad_scaler", None)]
    if not members:
        return optimizer.prepare_grads()
    scaler = members[0].grad_scaler
    unmoved = _Unmoved(scaler.inv_scale)
    for part in members:
        part.grad_scaler = unmoved
    try:
        found = optimizer.prepare_grads()
    finally:
        for part in members:
            part.grad_scaler = scaler
    scaler.update(found)
    return found


@dataclass(frozen=True, slots=True)
class _Unmoved:
    """A scale in the place of a scaler."""

    inv_scale: torch.Tensor

    def update(self, found_inf: bool) -> None:
        pass


def _divide(part: MegatronOptimizer, divisor: float) -> None:
    inner = part.optimizer
    if inner.defaults.get("fused"):
        device = inner.param_groups[0]["params"][0].device if inner.param_groups[0]["params"] else None
        inner.grad_scale = torch.full((), divisor, dtype=torch.float32, device=device)  # a copy would wait for the GPU
    elif gradients := [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]:
        torch._foreach_div_(gradients, divisor)
