"""Named process groups of one model: the mesh.

Ranks are numbered as Megatron numbers them: tensor parallel varies fastest, then context, data and pipeline. Experts
have axes of their own over the same ranks: expert tensor, expert, expert data, pipeline. A mesh may cover any ranks of
the job, so that several models can lie side by side; megatron-core's global `parallel_state` is never initialised, and
anything that falls back to it fails at once instead of computing on the wrong group.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from scale_llm.parallel.collectives import share


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshSizes:
    """Sizes of the axes. `world` is their product over tp, cp, dp and pp."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def expert_dp(self) -> int:
        return self.world // (self.expert_tp * self.ep * self.pp)


def partition(shape: dict[str, int], axes: Sequence[str]) -> list[list[int]]:
    """Positions 0..N-1 laid out in `shape` (outermost axis first), cut in groups along `axes`.

    >>> partition({"pp": 2, "tp": 2}, ["pp"])
    [[0, 2], [1, 3]]
    """
    grid = np.arange(int(np.prod(list(shape.values())))).reshape(list(shape.values()))
    names = list(shape)
    others = [names.index(n) for n in names if n not in axes]
    inside = [names.index(n) for n in names if n in axes]
    size = int(np.prod([shape[n] for n in axes])) if axes else 1
    return grid.transpose(others + inside).reshape(-1, size).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Groups and positions of this rank in one model's layout.

    groups: megatron-core's ProcessGroupCollection.
    world_group: all ranks of the mesh.
    host_group: the same ranks over gloo, for objects and flags on the host.
    """

    sizes: MeshSizes
    ranks: tuple[int, ...]
    groups: Any
    world_group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    ep_rank: int
    etp_rank: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.sizes.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank that holds this rank's last pipeline stage."""
        return dist.get_process_group_ranks(self.groups.pp)[-1]


class _Groups:
    """Makes process groups; every rank of the job must ask for the same ones in the same order."""

    def __init__(self, ranks: Sequence[int], backend: str, timeout: datetime.timedelta | None):
        self._ranks, self._backend, self._timeout = ranks, backend, timeout
        self._made: dict[tuple, dist.ProcessGroup] = {}

    def mine(self, parts: list[list[int]], *, shared: bool = True) -> dist.ProcessGroup | None:
        """This rank's group among the parts (positions in the mesh); None where it is in none.

        shared: equal sets of ranks get one communicator.
        """
        found = None
        for part in parts:
            ranks = tuple(self._ranks[i] for i in part)
            group = self._made.get(ranks) if shared else None
            if group is None:
                group = dist.new_group(list(ranks), timeout=self._timeout, backend=self._backend)
                if shared:
                    self._made[ranks] = group
            if dist.get_rank() in ranks:
                found = group
        return found


def build_mesh(
    sizes: MeshSizes, backend: str, ranks: Sequence[int] | None = None, timeout_minutes: float | None = None
) -> Mesh | None:  # fmt: skip
    """The mesh of `sizes` on `ranks` (None: the whole job). Every rank of the job must call it, in one order.

    timeout_minutes: how long a collective may wait; None: what torch has for the backend.

    Returns None on ranks outside. Raises ValueError where the sizes do not fit the ranks.
    """
    ranks = tuple(range(dist.get_world_size())) if ranks is None else tuple(ranks)
    if sizes.world != len(ranks):
        raise ValueError(f"mesh of {sizes.world} ranks (tp x cp x dp x pp) on {len(ranks)} ranks")
    if list(ranks) != sorted(set(ranks)):
        raise ValueError(
            f"mesh on ranks {list(ranks)}: give each once, in ascending order, as process groups sort them"
        )
    if sizes.expert_tp * sizes.ep * sizes.pp * sizes.expert_dp != sizes.world:
        raise ValueError(
            f"expert sizes etp {sizes.expert_tp} x ep {sizes.ep} x pp {sizes.pp} do not divide {sizes.world}"
        )
    dense = {"pp": sizes.pp, "dp": sizes.dp, "cp": sizes.cp, "tp": sizes.tp}
    expert = {"pp": sizes.pp, "dp": sizes.expert_dp, "ep": sizes.ep, "tp": sizes.expert_tp}
    timeout = None if timeout_minutes is None else datetime.timedelta(minutes=timeout_minutes)
    make = _Groups(ranks, backend, timeout)
    collection = _collection(make, dense, expert)
    world_group = make.mine([list(range(len(ranks)))])
    host_group = world_group if backend == "gloo" else _Groups(ranks, "gloo", timeout).mine([list(range(len(ranks)))])
    if dist.get_rank() not in ranks:
        return None
    assert world_group is not None and host_group is not None
    if backend == "gloo":
        _share_memory(collection, world_group, timeout_minutes)
    position = ranks.index(dist.get_rank())
    at = dict(zip(dense, np.unravel_index(position, list(dense.values())), strict=True))
    expert_at = dict(zip(expert, np.unravel_index(position, list(expert.values())), strict=True))
    return Mesh(
        sizes=sizes,
        ranks=ranks,
        groups=collection,
        world_group=world_group,
        host_group=host_group,
        tp_rank=int(at["tp"]),
        cp_rank=int(at["cp"]),
        dp_rank=int(at["dp"]),
        pp_rank=int(at["pp"]),
        ep_rank=int(expert_at["ep"]),
        etp_rank=int(expert_at["tp"]),
    )


def _share_memory(collection: Any, world_group: dist.ProcessGroup, timeout_minutes: float | None) -> None:
    """For what ranks of a mesh on CPUs wait for; all ranks of a group come to it in one order."""
    seconds = 60 * (timeout_minutes or 30)
    for name in ("tp", "cp", "dp", "mp", "tp_cp", "dp_cp", "tp_dp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp"):
        share(getattr(collection, name), seconds)
    share(world_group, seconds)


def _collection(make: _Groups, dense: dict[str, int], expert: dict[str, int]):
    """megatron-core's collection of groups, every field set: None where this rank is in no such group."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    pipelines = partition(dense, ["pp"])
    whole = [list(range(int(np.prod(list(dense.values())))))]
    dp_cp = make.mine(partition(dense, ["dp", "cp"]))
    expt_dp = make.mine(partition(expert, ["dp"]))
    return ProcessGroupCollection(
        tp=make.mine(partition(dense, ["tp"])),
        pp=make.mine(pipelines, shared=False),  # point-to-point traffic must not queue behind collectives
        cp=make.mine(partition(dense, ["cp"])),
        dp=make.mine(partition(dense, ["dp"])),
        mp=make.mine(partition(dense, ["pp", "tp"])),
        tp_cp=make.mine(partition(dense, ["cp", "tp"])),
        dp_cp=dp_cp,
        tp_dp_cp=make.mine(partition(dense, ["dp", "cp", "tp"])),
        embd=make.mine([[p[0], p[-1]] if len(p) > 1 else p for p in pipelines]),
        pos_embd=make.mine([p[:1] for p in pipelines]),
        ep=make.mine(partition(expert, ["ep"])),
        expt_tp=make.mine(partition(expert, ["tp"])),
        tp_ep=make.mine(partition(expert, ["ep", "tp"])),
        tp_ep_pp=make.mine(partition(expert, ["pp", "ep", "tp"])),
        expt_dp=expt_dp,
        intra_dp_cp=dp_cp,
        intra_expt_dp=expt_dp,
        intra_dist_opt=make.mine(whole),
        inter_dist_opt=None,
        hcp=None,
    )
