"""What ranks do in the tests of memory: count what a forward pass keeps for its backward pass."""

from typing import Any

import torch

from support.batches import samples
from support.training import config, make_engine, micro_batches


def kept_bytes(overrides: dict[str, Any]) -> int:
    """Bytes of all storages, weights apart, that autograd holds when the loss of one micro-batch is known."""
    cfg = config(overrides)
    engine, loss_fn = make_engine(cfg)
    engine.train_step(micro_batches(samples(0), engine.mesh, cfg.train.micro_batch_size)[:1], loss_fn, samples=1)
    weights = {tensor.untyped_storage().data_ptr() for chunk in engine.modules for tensor in chunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    done = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not done and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    def loss(output, batch):
        nonlocal done
        result, done = loss_fn(output, batch), True
        return result

    batches = micro_batches(samples(1), engine.mesh, cfg.train.micro_batch_size)[:1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train_step(batches, loss, samples=1)
    return sum(storage.nbytes() for storage in kept.values())
