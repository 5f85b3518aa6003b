"""Weights of a model from an engine on one mesh to an engine on another, over the ranks of one job.

The meshes may be of the same ranks, of other ones or overlap, with any parallel sizes each. What a rank of the target
already holds is copied; all else goes over the network to every rank that needs it, in buckets: one all-to-all each, so
that memory beyond the weights is bounded.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from scale_llm.config.errors import UserError
from scale_llm.engine.engine import Engine
from scale_llm.engine.movement_checksum import differences, sum_of_bits
from scale_llm.engine.movement_plan import Box, Part, Plan, Shard, make_plan, owned
from scale_llm.engine.state import follow_weights, sharded_model_state
from scale_llm.models.init import shards

BUCKET_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Moved:
    """sent_bytes: between different ranks, over the whole job; total_bytes: with copies on a rank; seconds: here."""

    sent_bytes: int
    total_bytes: int
    seconds: float


@dataclass(slots=True)
class _Side:
    """What every rank learns of another rank's engine. vocab_size: None where it has none."""

    shards: list[Shard] = field(default_factory=list)
    vocab_size: int | None = None
    problems: list[str] = field(default_factory=list)


class Movement:
    """A plan, made once, by which the target's weights become the source's as often as asked."""

    def __init__(
        self, source: Engine | None, target: Engine | None, group: dist.ProcessGroup, host_group: dist.ProcessGroup,
        *, bucket_bytes: int = BUCKET_BYTES, checksum: bool = False, ranks_per_node: int | None = None,
    ):  # fmt: skip
        """Every rank of the job makes it. source, target: None where this rank is not in that mesh.

        group: all ranks of the job, on the device's backend; host_group: the same over gloo. bucket_bytes: memory
        beyond the weights. checksum: `verify` after every movement. ranks_per_node: see make_plan.

        Raises:
            UserError: on every rank: the engines do not hold the same model, or have adapters.
        """
        self._source, self._target = source, target
        self._group, self._host_group, self._checksum = group, host_group, checksum
        self._bucket_bytes, self._rank = bucket_bytes, dist.get_rank(group)
        on_cuda = "nccl" in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        held, wanted = _tensors(source), _tensors(target)
        sides = self._gathered((_described(source, held), _described(target, wanted)))
        self._sources = [side.shards for side, _ in sides]
        self._targets = [side.shards for _, side in sides]
        plan = _planned(sides, self._sources, self._targets, bucket_bytes, ranks_per_node)
        self._whole, self._bytes = plan.whole, (plan.sent_bytes, plan.total_bytes)
        self._local, *self._buckets = [self._mine(parts) for parts in (plan.local, *plan.buckets)]
        self._held, self._wanted = [_whole_rank(tensor) for tensor in held], [_whole_rank(tensor) for tensor in wanted]
        self._dtypes = {shard.name: getattr(torch, shard.dtype) for mine in self._targets for shard in mine}

    @torch.no_grad()
    def run(self) -> Moved:
        """Every rank calls it, between training steps.

        Raises:
            RuntimeError: with checksum, on every rank: what arrived is not what was sent.
        """
        for engine in (self._source, self._target):
            if engine is not None:
                engine.require_weights()
        self._synchronize()
        began = time.perf_counter()
        if self._source is not None:
            self._source.gather_parameters()
        _copy(map(self._to, self._local), map(self._from, self._local))
        for bucket in self._buckets:
            self._exchange(bucket)
        self._clear_padding()
        if self._target is not None:
            follow_weights(self._target)
        self._synchronize()
        seconds = time.perf_counter() - began
        if self._checksum:
            self.verify()
        return Moved(*self._bytes, seconds)

    @torch.no_grad()
    def verify(self) -> None:
        """After `run`: an exact sum of every tensor's bits at the source and on every replica of the target, compared.
        A collective.

        Raises:
            RuntimeError: on every rank: some differ, with their names.
        """
        once = owned(self._sources)
        mine = [i for i in range(len(self._held)) if (self._rank, i) in once]
        sources = [(self._sources[self._rank][i].name, self._sum(self._sources, self._held, i)) for i in mine]
        targets = [self._sum(self._targets, self._wanted, i) for i in range(len(self._wanted))]
        gathered = self._gathered((sources, targets))
        problems = differences(
            [pair for pairs, _ in gathered for pair in pairs], self._targets, [sums for _, sums in gathered]
        )
        if problems:
            raise RuntimeError("\n".join(f"weights that were moved: {problem}" for problem in problems))

    def _mine(self, parts: list[Part]) -> list[Part]:
        """Those that this rank sends or receives: of a large job's plan it keeps no more."""
        return [part for part in parts if self._rank in (part.source[0], part.target[0])]

    def _sum(self, sides: list[list[Shard]], tensors: list[torch.Tensor], number: int) -> int:
        """Over what both layouts have of one shard of this rank."""
        shard = sides[self._rank][number]
        box = shard.box.intersection(self._whole[shard.name])
        if box is None:
            return 0
        data = tensors[number][box.within(shard.box)]
        most = max(1, self._bucket_bytes // 64)
        return sum_of_bits(data, box, self._whole[shard.name].shape, self._dtypes[shard.name], most)

    def _exchange(self, bucket: list[Part]) -> None:
        """One all-to-all: what goes to a rank lies together, in the order in which that rank expects it."""
        sends = [part for part in bucket if part.source[0] == self._rank]
        receives = [part for part in bucket if part.target[0] == self._rank]
        sent, received = self._buffer(sends), self._buffer(receives)
        _copy(self._parts_of(sent, sends), map(self._from, sends))
        dist.all_to_all_single(
            received, sent,
            self._splits((part.source[0], part) for part in receives),
            self._splits((part.target[0], part) for part in sends),
            group=self._group,
        )  # fmt: skip
        _copy(map(self._to, receives), self._parts_of(received, receives))

    def _buffer(self, parts: list[Part]) -> torch.Tensor:
        return torch.empty(sum(part.room for part in parts), dtype=torch.uint8, device=self._device)

    def _parts_of(self, buffer: torch.Tensor, parts: list[Part]) -> Iterable[torch.Tensor]:
        offset = 0
        for part in parts:
            yield buffer[offset : offset + part.bytes].view(self._dtypes[part.name]).view(part.box.shape)
            offset += part.room

    def _splits(self, parts: Iterable[tuple[int, Part]]) -> list[int]:
        """Bytes by the other rank."""
        splits = [0] * dist.get_world_size(self._group)
        for rank, part in parts:
            splits[rank] += part.room
        return splits

    def _from(self, part: Part) -> torch.Tensor:
        """What this rank holds of the source, as the part wants it."""
        number = part.source[1]
        return self._held[number][part.box.within(self._sources[self._rank][number].box)]

    def _to(self, part: Part) -> torch.Tensor:
        """Where on this rank the part goes."""
        number = part.target[1]
        return self._wanted[number][part.box.within(self._targets[self._rank][number].box)]

    def _clear_padding(self) -> None:
        """Rows of a vocabulary that this layout has beyond the source's: no token stands for them."""
        for shard, data in zip(self._targets[self._rank], self._wanted, strict=True):
            rows = self._whole[shard.name].shape[0] - shard.box.start[0]
            if shard.rows_vary and rows < shard.box.shape[0]:
                data[max(rows, 0) :] = 0

    def _gathered(self, mine: Any) -> list[Any]:
        """Every rank's, in order."""
        every: list[Any] = [None] * dist.get_world_size(self._host_group)
        dist.all_gather_object(every, mine, group=self._host_group)
        return every

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _planned(sides: list[tuple[_Side, _Side]], sources, targets, bucket_bytes: int, ranks_per_node: int | None) -> Plan:
    problems = [text for pair in sides for side in pair for text in side.problems]
    sizes = {side.vocab_size for pair in sides for side in pair} - {None}
    if len(sizes) > 1:
        problems.append(f"moving weights: vocabularies of {sorted(sizes)} tokens; both must be the same model")
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return make_plan(
        sources, targets, vocab_size=min(sizes, default=0), bucket_bytes=bucket_bytes, ranks_per_node=ranks_per_node
    )


def _tensors(engine: Engine | None) -> list[ShardedTensor]:
    """This rank's shards by their names and places in a checkpoint. A collective of the engine's mesh."""
    return [] if engine is None or engine.has_adapters else list(shards(sharded_model_state(engine)))


def _described(engine: Engine | None, tensors: list[ShardedTensor]) -> _Side:
    if engine is None:
        return _Side()
    side = _Side([_shard(tensor) for tensor in tensors], engine.vocab_size)
    if engine.has_adapters:
        side.problems.append(
            f"peft.method={engine.peft.method.value}: weights with adapters beside them cannot be moved to another "
            "mesh; merge them first (tools/convert_checkpoint.py merge)"
        )
    storages = {
        tensor.untyped_storage()._cdata
        for module in engine.modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    for tensor in tensors:  # writing into a copy would change nothing
        if tensor.data.untyped_storage()._cdata not in storages:
            side.problems.append(f"{tensor.key}: its layer stores it in another form than checkpoints do")
    return side


def _shard(tensor: ShardedTensor) -> Shard:
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return Shard(
        name=tensor.key,
        box=Box(tuple(tensor.global_offset), shape),
        whole=tuple(tensor.global_shape),
        dtype=str(tensor.data.dtype).removeprefix("torch."),
        item_bytes=tensor.data.element_size(),
        rows_vary=tensor.allow_shape_mismatch,
    )


def _whole_rank(tensor: ShardedTensor) -> torch.Tensor:
    """A view of the parameter with as many axes as the whole tensor has."""
    return tensor.data.detach()[(None,) * tensor.prepend_axis_num]


def _copy(into: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    """Element formats may differ."""
    targets, sources = list(into), list(values)
    if targets:
        torch._foreach_copy_(targets, sources)
