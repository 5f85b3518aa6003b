"""What ranks do in the tests of offloading: train with the engine's memory taken away between steps."""

import gc
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.checkpoint.snapshot import SharedMemory
from scale_llm.engine.engine import Engine
from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.samples import SamplingParams
from scale_llm.engine.norms import parameter_norm
from scale_llm.engine.state import (
    follow_weights,
    load_model_state,
    load_optimizer_state,
    sharded_model_state,
    sharded_optimizer_state,
)
from support.batches import GLOBAL_BATCH, SEQ_LENGTH, VOCAB_SIZE, samples
from support.training import config, join, make_engine, micro_batches
from support.whole_model import whole_model

STEPS = 3


def train(overrides: dict[str, Any], away: bool) -> dict[str, Any]:
    """Losses, gradient norms and the whole model after some steps. away: offloaded, twice, between all steps."""
    engine, loss = make_engine(config(overrides))
    if engine.has_adapters:
        engine.begin_adapters([1])
    seen: dict[str, Any] = {"loss": [], "grad_norm": [], "evaluated": []}
    for step in range(STEPS):
        batches = micro_batches(samples(step), engine.mesh, 1)
        for _ in range(2 * away):
            engine.offload()
        if away:
            engine.onload()
        result = engine.train_step(batches, loss, samples=GLOBAL_BATCH)
        seen["loss"].append(result.metrics["lm loss"])
        seen["grad_norm"].append(result.grad_norm)
        if away:
            engine.offload()
            engine.onload()
        seen["evaluated"].append(engine.evaluate(batches, loss)["lm loss"])
    if away:
        seen["left"] = _away_and_back(engine)
    engine.gather_parameters()
    seen["model"] = whole_model(engine)
    return seen


def _away_and_back(engine: Engine) -> dict[str, Any]:
    """Bytes in tensors of the process before, while away and after; what was reported."""
    before = _tensors()
    gone = engine.offload()
    again = engine.offload()
    there = _tensors()
    held = sum(storage.nbytes() for storage in _storages(engine))
    host = sum(block.nbytes for block in engine._offload._host._blocks)
    back = engine.onload()
    assert engine.onload().copied_bytes == again.copied_bytes == 0
    after = _tensors()
    return {
        "before": sum(before.values()), "away": sum(there.values()) - host, "held": held,
        "came_back": sum(after[storage] - size for storage, size in there.items() if storage in after),
        "copied": gone.copied_bytes, "freed": gone.device_bytes, "returned": back.device_bytes,
        "gradients": sum(float(p.main_grad.abs().sum()) for m in engine.modules for p in m.parameters()
                         if hasattr(p, "main_grad")),
    }  # fmt: skip


def _tensors() -> dict[int, int]:
    """Storage -> bytes, of all tensors of this process. Host buffers are among them."""
    gc.collect()
    shared = SharedMemory()  # of ranks for collectives: no engine's
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [tensor for tensor in tensors if tensor.device.type == "cpu" and not shared.holds(tensor)]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def _storages(engine: Engine) -> list[torch.UntypedStorage]:
    """Of weights, gradients and optimizer state, found here by other ways than the engine's."""
    tensors = [p for module in engine.modules for p in module.parameters()]
    tensors += [p.main_grad for p in tensors if hasattr(p, "main_grad")]
    for part in getattr(engine.optimizer, "chained_optimizers", []):
        if part.optimizer is not None:
            tensors += [p for group in part.optimizer.param_groups for p in group["params"]]
            tensors += [value for state in part.optimizer.state.values() for value in state.values()]
    return [tensor.untyped_storage() for tensor in tensors]


def frozen() -> dict[str, Any]:
    """An engine without an optimizer: its answers before and after, and bytes."""
    cfg = config({})
    device, mesh = join(cfg)
    engine = Engine(cfg, mesh, device, vocab_size=VOCAB_SIZE, trainable=False)
    ask = lambda: engine.forward(micro_batches(samples(0), mesh, 1), lambda out, _: out.clone())  # noqa: E731
    before = ask()
    left = _away_and_back(engine)
    return {"same": all(map(torch.equal, before, ask())), "left": left}


def used_while_away() -> dict[str, str | None]:
    """What every use of an engine says while it is offloaded."""
    engine, loss = make_engine(config({}))
    batches = micro_batches(samples(0), engine.mesh, 1)
    generator = Generator(engine, max_batch_size=1, max_seq_length=SEQ_LENGTH)
    model = sharded_model_state(engine)
    uses = {
        "train_step": lambda: engine.train_step(batches, loss, samples=GLOBAL_BATCH),
        "evaluate": lambda: engine.evaluate(batches, loss),
        "forward": lambda: engine.forward(batches, lambda out, _: out),
        "generate": lambda: generator.generate([[1]], SamplingParams(max_new_tokens=2), [0]),
        "gather_parameters": engine.gather_parameters,
        "begin_adapters": lambda: engine.begin_adapters([1]),
        "parameter_norm": lambda: parameter_norm(engine),
        "sharded_model_state": lambda: sharded_model_state(engine),
        "sharded_optimizer_state": lambda: sharded_optimizer_state(engine, model, loading=False),
        "load_model_state": lambda: load_model_state(engine, {}, main_weights=True),
        "load_optimizer_state": lambda: load_optimizer_state(engine, {}, {}),
        "follow_weights": lambda: follow_weights(engine),
    }
    engine.offload()
    said: dict[str, str | None] = {}
    for name, use in uses.items():
        said[name] = None
        try:
            use()
        except RuntimeError as error:
            said[name] = str(error)
    engine.onload()
    dist.barrier()
    return said
