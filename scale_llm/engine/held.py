"""What an engine holds on its device, tensor by tensor, with the words for it."""

from collections.abc import Iterator

import torch

from scale_llm.engine.engine import Engine
from scale_llm.engine.optimizer import parts
from scale_llm.models.adapters.layers import quantised_tensors

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer state"


def held_tensors(engine: Engine) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor). Several may be views of one storage: the first that is one has the best name."""
    chunks = engine.chunks if engine.optimizer is not None else []  # megatron-core's wrappers
    for buffer in (buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)):
        yield GRADIENTS, "gradient buffer", buffer.grad_data
        if buffer.param_data is not None:
            yield WEIGHTS, "buffer of weights", buffer.param_data
    for module in engine.modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield WEIGHTS, name, tensor
            if getattr(tensor, "grad", None) is not None:
                yield GRADIENTS, f"gradient of {name}", tensor.grad
        for tensor in quantised_tensors(module):
            yield WEIGHTS, "weights in 4 bits", tensor
    for part in parts(engine.optimizer) if engine.optimizer is not None else []:
        if part.optimizer is None:
            continue
        for group in part.optimizer.param_groups:
            for tensor in group["params"]:
                yield OPTIMIZER, "main weights", tensor
        for state in part.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield OPTIMIZER, name, value
