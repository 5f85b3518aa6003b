"""What ranks do in tests of experts whose gradients overflow."""

import math
from typing import Any

import torch

from support.batches import samples
from support.training import config, make_engine, micro_batches

FP16 = {"precision.fp16": True, "precision.initial_loss_scale": 1024.0, "precision.hysteresis": 1}


def overflow_of_experts(overrides: dict[str, Any]) -> dict[str, list]:
    """Two steps on the same samples; in the first one gradient of this rank's experts is infinite."""
    cfg = config({**FP16, **overrides})
    engine, loss = make_engine(cfg)
    finalize, broken = engine.config.finalize_model_grads_func, [True, False]

    def spoil(*args, **kwargs):
        finalize(*args, **kwargs)
        if broken.pop(0):
            expert = next(p for p in engine.modules[0].parameters() if not getattr(p, "allreduce", True))
            expert.main_grad.view(-1)[0] = math.inf

    engine.config.finalize_model_grads_func = spoil
    batch = samples(0)
    steps = [
        engine.train_step(micro_batches(batch, engine.mesh, cfg.train.micro_batch_size), loss, samples=1)
        for _ in (0, 1)
    ]
    return {name: [getattr(step, name) for step in steps] for name in ("skipped", "loss_scale", "grad_norm")}


def balancing_gradient(overrides: dict[str, Any], counted: float) -> float:
    """The norm of the gradient of the load-balancing loss alone, beside a loss of 0 that counts so much of each row."""
    cfg = config({**overrides, "optim.clip_grad": 0.0})
    engine, _ = make_engine(cfg)

    def nothing(logits, batch):
        count = torch.tensor(counted * logits.size(1))
        return logits.sum() * 0, count, {"lm loss": (torch.zeros(()), count)}

    batches = micro_batches(samples(0), engine.mesh, cfg.train.micro_batch_size)
    result = engine.train_step(batches, nothing, samples=1, counts=lambda batch: counted * len(batch["tokens"]))
    return result.grad_norm
