"""What ranks do in the tests of adapters: train them over the tiny model's initial weights."""

from typing import Any

import torch

from scale_llm.models.adapters.layers import quantised_tensors
from support.batches import GLOBAL_BATCH, samples
from support.training import config, make_engine, micro_batches
from support.whole_model import whole_model


def train(overrides: dict[str, Any], steps: int = 8) -> dict[str, Any]:
    """Every step's loss and gradient norm; how many tensors of frozen weights in 4 bits there are and have moved; on
    rank 0 which tensors of the whole model have moved, and the bytes of the weights of linear layers."""
    cfg = config(overrides)
    engine, loss = make_engine(cfg)
    if engine.has_adapters:
        engine.begin_adapters(prompt=[3, 1, 4])
    before, quantised = whole_model(engine), _quantised(engine)
    seen: dict[str, Any] = {"loss": [], "grad_norm": []}
    virtual = cfg.peft.num_virtual_tokens if cfg.peft.method.value == "prompt_tuning" else 0
    for step in range(steps):
        batch = samples(step)
        if virtual:
            batch["tokens"][:, :virtual] = 250 + batch["position_ids"][:, :virtual]
            batch["loss_mask"][:, :virtual] = 0
        result = engine.train_step(micro_batches(batch, engine.mesh, 1), loss, samples=GLOBAL_BATCH)
        seen["loss"].append(result.metrics["lm loss"])
        seen["grad_norm"].append(result.grad_norm)
    after = whole_model(engine)
    seen["quantised"] = len(quantised)
    seen["quantised_moved"] = sum(not a.equal(b) for a, b in zip(quantised, _quantised(engine), strict=True))
    if before is not None:
        seen["moved"] = [name for name, value in before.items() if not value.equal(after[name])]
    seen["weight_bytes"] = sum(_bytes(module) for module in engine.modules[0].modules() if hasattr(module, "adapter"))
    return seen


def begun(overrides: dict[str, Any], prompt: list[int]) -> tuple[dict | None, dict | None]:
    """The whole model once its virtual tokens have begun as those of the prompt, and after a step that learns nothing
    (on rank 0)."""
    engine, loss = make_engine(config({**overrides, "optim.lr": 0.0, "optim.weight_decay": 0.0}))
    engine.begin_adapters(prompt)
    begun = whole_model(engine)
    engine.train_step(micro_batches(samples(0), engine.mesh, 1), loss, samples=GLOBAL_BATCH)
    return begun, whole_model(engine)


def _quantised(engine) -> list[torch.Tensor]:
    return [tensor.clone() for module in engine.modules for tensor in quantised_tensors(module)]


def _bytes(layer) -> int:
    quantised = layer._nf4
    if quantised is None:
        return layer.weight.untyped_storage().nbytes()
    state = quantised._state
    tensors = [quantised._packed, state.absmax, state.state2.absmax]
    return layer.weight.untyped_storage().nbytes() + sum(tensor.untyped_storage().nbytes() for tensor in tensors)
