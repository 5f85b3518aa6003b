"""Whether ranks that should hold the same weights do: a chip that computes wrong numbers says nothing."""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist

from scale_llm.engine.engine import Engine
from scale_llm.engine.movement_checksum import sum_of_bits
from scale_llm.engine.movement_plan import Box

MOST = 1 << 24
"""Elements at a time."""


@dataclass(frozen=True, slots=True)
class Different:
    """ranks: of the job, whose weights are unlike those of most; all of them where none are the most. name: of the
    first tensor."""

    ranks: tuple[int, ...]
    name: str
    tensors: int


@torch.no_grad()
def unlike_replicas(engine: Engine) -> Different | None:
    """Compares checksums of every weight over data- and context-parallel replicas, for this rank's own part of the
    model; None: all are the same. A collective of the mesh."""
    engine.gather_parameters()
    groups = engine.mesh.groups
    found: list[tuple[int, str]] = []
    for expert in (False, True):
        group = groups.expt_dp if expert else groups.dp_cp
        named = [pair for pair in _parameters(engine) if (not getattr(pair[1], "allreduce", True)) is expert]
        if dist.get_world_size(group) == 1 or not named:
            continue
        sums = torch.tensor([_signed(_sum(parameter)) for _, parameter in named], device=engine.device.device)
        of_all = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
        dist.all_gather(of_all, sums, group=group)
        ranks = dist.get_process_group_ranks(group)
        found += _unlike([part.tolist() for part in of_all], ranks, [name for name, _ in named])
    if not found:
        return None
    return Different(tuple(sorted({rank for rank, _ in found})), found[0][1], len({name for _, name in found}))


def _unlike(sums: list[list[int]], ranks: list[int], names: list[str]) -> list[tuple[int, str]]:
    """(rank, tensor) of every sum that differs from the one that more than half of the ranks have."""
    found = []
    for place, name in enumerate(names):
        values = [part[place] for part in sums]
        (common, count), *others = Counter(values).most_common()
        if others:
            most = count > len(values) / 2
            found += [(rank, name) for rank, value in zip(ranks, values, strict=True) if not most or value != common]
    return found


def _parameters(engine: Engine):
    for chunk, module in enumerate(engine.modules):
        for name, parameter in module.named_parameters():
            yield (f"{chunk}.{name}" if len(engine.modules) > 1 else name), parameter


def _sum(parameter: torch.Tensor) -> int:
    shape = tuple(parameter.shape)
    return sum_of_bits(parameter.detach(), Box((0,) * len(shape), shape), shape, parameter.dtype, MOST)


def _signed(value: int) -> int:
    """Of 64 bits, as torch has no other whole numbers of that size."""
    return value - (1 << 64) if value >= 1 << 63 else value
