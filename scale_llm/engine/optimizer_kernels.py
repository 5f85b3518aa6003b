"""Whose optimizer a run takes: Apex's where it is installed, Transformer Engine's else, torch's fused one else.

megatron-core asks for Transformer Engine's first, and for both when it is imported. `parallel.gpu` and `parallel.cpu`
have hidden from it what does not work.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.optimizer import distrib_optimizer

_PLACES = {"Apex": "apex.optimizers", "Transformer Engine": "transformer_engine.pytorch.optimizers"}


def fused_adam() -> tuple[str, Any] | None:
    """(library, class) of the first FusedAdam that is there; None: none is."""
    for library, module in _PLACES.items():
        try:
            return library, importlib.import_module(module).FusedAdam
        except (ImportError, AttributeError):
            continue
    return None


@contextmanager
def chosen() -> Iterator[None]:
    """megatron-core builds optimizers with that Adam, and with torch's SGD, whose fused kernel is as good."""
    found, module = fused_adam(), megatron.core.optimizer
    before = (module.Adam, module.SGD, module.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam)
    module.SGD = torch.optim.SGD
    if found is not None:
        module.Adam = distrib_optimizer.Adam = found[1]
        module.USING_PYTORCH_OPTIMIZER = False
    try:
        yield
    finally:
        module.Adam, module.SGD, module.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam = before


def counts_steps_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """Apex and Transformer Engine count steps in a parameter group, from 1 where it says nothing; torch for each
    parameter, in a tensor."""
    return not isinstance(optimizer, torch.optim.Adam | torch.optim.SGD)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """For the log."""
    kind = type(optimizer)
    libraries = {place.partition(".")[0]: library for library, place in _PLACES.items()}
    return f"{libraries.get(kind.__module__.partition('.')[0], 'torch')}'s {kind.__name__}"
