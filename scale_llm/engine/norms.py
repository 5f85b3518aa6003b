"""Norm of all parameters, each counted once whatever the layout."""

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from scale_llm.engine.engine import Engine
from scale_llm.parallel import collectives


def parameter_norm(engine: Engine) -> float:
    """Euclidean norm over the whole model. A collective."""
    engine.require_weights()
    groups = engine.mesh.groups
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device.device)
    for module in engine.modules:
        for parameter in module.parameters():
            if not param_is_not_shared(parameter):
                continue
            expert = not getattr(parameter, "allreduce", True)
            if expert or param_is_not_tensor_parallel_duplicate(parameter, tp_group=groups.tp):
                totals[int(expert)] += parameter.detach().double().square().sum()
    collectives.all_reduce(totals[:1], group=groups.mp)
    collectives.all_reduce(totals[1:], group=groups.tp_ep_pp)
    return float(totals.sum().sqrt())
