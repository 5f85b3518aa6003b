"""What one rank holds of an engine, as it lies in its memory: for copies that the same layout loads again."""

from bisect import bisect_right, insort
from collections.abc import Iterator
from typing import Any

import torch

from scale_llm.engine.engine import Engine
from scale_llm.engine.optimizer import parts
from scale_llm.engine.state import load_numbers
from scale_llm.models import fp8
from scale_llm.models.adapters.names import is_adapter


def own_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Everything that training changes, by names that every start of the same layout gives: weights (adapters alone
    where there are any), main weights, the optimizer's state. What lies within another is left out. A collective."""
    engine.gather_parameters()
    found: dict[str, torch.Tensor] = {}
    ranges: list[tuple[int, int]] = []
    for name, tensor in _all(engine):
        tensor = tensor.detach()
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        place = bisect_right(ranges, (first, 1 << 63)) - 1
        if tensor.is_contiguous() and place >= 0 and ranges[place][1] >= end > first:
            continue
        found[name] = tensor
        if tensor.is_contiguous():
            insort(ranges, (first, end))
    return found


def load_own(engine: Engine, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    """What `own_tensors` and `plain_state` gave. The base under adapters must have been loaded.

    Raises:
        ValueError: they are of another layout; nothing is changed then.
    """
    mine = own_tensors(engine)
    like = {name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()}
    if like != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
        raise ValueError("tensors of another layout")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
    load_numbers(engine, plain)


def _all(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    for i, module in enumerate(engine.modules):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not engine.has_adapters or is_adapter(name):
                yield f"model{i}.{name}", tensor
    yield from fp8.state(engine.modules).items()
    assert engine.optimizer is not None
    for i, part in enumerate(parts(engine.optimizer)):
        if part.optimizer is None:  # its ranks hold none of these parameters
            continue
        for j, group in enumerate(part.optimizer.param_groups):
            for k, main in enumerate(group["params"]):
                yield f"optimizer{i}.{j}.{k}.main", main
                for name, value in part.optimizer.state[main].items():
                    if isinstance(value, torch.Tensor):
                        yield f"optimizer{i}.{j}.{k}.{name}", value
