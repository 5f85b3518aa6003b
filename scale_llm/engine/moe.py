"""The routers' load-balancing loss as a metric, the same under any layout."""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)

from scale_llm.parallel.mesh import Mesh


def load_balancing_losses(mesh: Mesh, device: torch.device, *, num_layers: int, micro_batches: int) -> dict[str, float]:
    """Mean over layers and micro-batches of each kind of loss, before its coefficient; then starts anew. A collective.

    micro_batches: of one data-parallel rank.
    """
    tracker = get_moe_layer_wise_logging_tracker()
    means = {}
    for name in _names(tracker, mesh):
        value = tracker[name]["values"].sum() if name in tracker else torch.zeros((), device=device)
        dist.all_reduce(value, group=mesh.world_group)
        # Ranks that share a micro-batch hold parts of its loss; data-parallel ranks hold one each.
        means[name] = float(value) / (num_layers * micro_batches * mesh.sizes.dp)
    clear_aux_losses_tracker()
    return means


def _names(tracker: dict, mesh: Mesh) -> list[str]:
    """Every rank's names: pipeline stages may hold other layers."""
    if mesh.sizes.pp == 1:
        return sorted(tracker)
    names: list[list[str]] = [[] for _ in mesh.ranks]
    dist.all_gather_object(names, sorted(tracker), group=mesh.host_group)
    return sorted({name for part in names for name in part})
