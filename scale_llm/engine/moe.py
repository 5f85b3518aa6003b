"""The routers' load-balancing loss: its weight beside a loss that counts other things than places, and as a metric, the
same under any layout."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from scale_llm.parallel import collectives
from scale_llm.parallel.mesh import Mesh

Batch = dict[str, torch.Tensor]
Counts = Callable[[Batch], float | torch.Tensor]
"""What a loss counts of a micro-batch of this data-parallel rank, which its sum is divided by."""


class Balancing:
    """The coefficient of a step. megatron-core adds the mean over the places of a micro-batch times their number, to be
    divided by the places of the global batch; the engine divides by what the loss counts, which may be tokens of
    answers, or pairs."""

    def __init__(self, config: TransformerConfig, mesh: Mesh, device: torch.device):
        self._config, self._group, self._device = config, mesh.groups.dp, device
        self._coefficient = config.moe_aux_loss_coeff if config.num_moe_experts else 0.0

    def weigh(self, batches: list[Batch], counts: Counts | None) -> bool:
        """Before the forward passes of a step; False where there is no such loss. A collective."""
        if not self._coefficient:
            return False
        places = float(sum(batch["tokens"].numel() for batch in batches))
        counted = places if counts is None else float(sum(counts(batch) for batch in batches))
        total = torch.tensor([counted, places], dtype=torch.float64, device=self._device)
        collectives.all_reduce(total, group=self._group)
        counted, places = total.tolist()
        self._config.moe_aux_loss_coeff = self._coefficient * counted / places
        return counted > 0


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
