"""Which rank writes which tensor where, as megatron-core plans it; a plan serves until the state's structure changes.

A plan costs several exchanges between all ranks, which compare what they hold (every tensor is written once and whole)
and tell rank 0 what will lie in their files, and some 20 microseconds a tensor.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from scale_llm.checkpoint.part_writer import Part, Written
from scale_llm.checkpoint.snapshot import held
from scale_llm.checkpoint.summed_file import to_disk

WriteIndex = Callable[[list[Written]], None]
"""Writes `.metadata` on rank 0, given what all ranks wrote."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the data of an item come from: leaves by position among all; several objects may be one item."""

    leaves: tuple[int, ...]
    shape: torch.Size | None = None
    """Of a tensor in its file, which has axes of length 1 before those of the leaf."""


@dataclass(frozen=True, slots=True)
class _Plan:
    items: list[WriteItem]
    sources: list[_Source]
    index: Metadata | None
    """On rank 0."""


class Planning:
    """Plans saves of one run. Every rank calls all methods alike."""

    def __init__(self) -> None:
        self._structure: list[Any] | None = None
        self._next: list[Any] = []
        self._leaves: list[ShardedBase] = []
        self._plan: _Plan | None = None

    def prepare(self, state: dict[str, Any]) -> tuple[bool, int]:
        """(whether the last plan does not fit, bytes that this rank will write). No collective; applies factories."""
        apply_factories(state)
        self._leaves = [leaf for leaf in nested_values(state) if isinstance(leaf, ShardedTensor | ShardedObject)]
        self._next = [_structure(leaf) for leaf in self._leaves]
        tensors = (leaf for leaf in self._leaves if isinstance(leaf, ShardedTensor))
        mine = sum(leaf.data.numel() * leaf.data.element_size() for leaf in tensors if is_main_replica(leaf.replica_id))
        return self._plan is None or self._next != self._structure, mine

    def plan(self, state: dict[str, Any], directory: Path, *, anew: bool) -> tuple[Part, WriteIndex]:
        """Takes hold of the state as it is; rank 0 writes common.pt. Collective where `anew`.

        anew: the last plan does not fit on some rank.

        Raises:
            CheckpointingException: ranks hold parts that do not make a whole.
        """
        leaves, self._leaves = self._leaves, []
        part, writer = self._make(state, leaves, directory) if anew else self._serve(state, leaves, directory)
        return part, partial(_write_index, writer, self._plan.index if self._plan else None)

    def _make(self, state: dict[str, Any], leaves: list[ShardedBase], directory: Path) -> tuple[Part, "_Writer"]:
        self._plan = self._structure = None
        strategy = _Strategy("torch_dist", 1, thread_count=1)
        with _our_writer():
            dist_checkpointing.save(state, str(directory), strategy, async_sharded_save=True)
        writer, index = strategy.planned
        self._plan = _Plan(writer.items, _sources(writer.items, writer.data, leaves), index)
        self._structure = self._next
        return writer.take(), writer

    def _serve(self, state: dict[str, Any], leaves: list[ShardedBase], directory: Path) -> tuple[Part, "_Writer"]:
        assert self._plan is not None
        common = save_preprocess(state, validate_access_integrity=False)[1]
        TorchCommonSaveStrategy("torch", 1).save_common(common, directory)
        writer = _Writer(directory, thread_count=1)
        writer.keep(self._plan.items, [_data(source, leaves) for source in self._plan.sources])
        return writer.take(), writer


def _structure(leaf: ShardedBase) -> tuple[Any, ...]:
    """Everything that a plan depends on."""
    if isinstance(leaf, ShardedObject):
        return leaf.key, tuple(leaf.global_shape), tuple(leaf.global_offset), leaf.replica_id
    shapes = tuple(leaf.local_shape), tuple(leaf.global_shape), tuple(leaf.global_offset), leaf.axis_fragmentations
    flat = leaf.flattened_range and (leaf.flattened_range.start, leaf.flattened_range.stop)
    return leaf.key, leaf.dtype, shapes, leaf.replica_id, leaf.prepend_axis_num, flat


def _sources(items: list[WriteItem], data: list[Any], leaves: list[ShardedBase]) -> list[_Source]:
    """Of every item of a plan that was made of these leaves. A tensor of several parts on one rank is told by place."""
    by_name: dict[str, list[int]] = defaultdict(list)
    for position, leaf in enumerate(leaves):
        if is_main_replica(leaf.replica_id):
            by_name[leaf.unique_key if isinstance(leaf, ShardedObject) else leaf.key].append(position)
    found = []
    for item, value in zip(items, data, strict=True):
        positions = by_name[item.index.fqn]
        if isinstance(value, torch.Tensor):
            offset = tuple(item.index.offset or ())
            positions = [p for p in positions if tuple(leaves[p].global_offset) == offset]
            assert len(positions) == 1, f"{item.index} is {len(positions)} tensors of the state"
            found.append(_Source(tuple(positions), value.shape))
        else:
            found.append(_Source(tuple(positions)))
    return found


def _data(source: _Source, leaves: list[ShardedBase]) -> torch.Tensor | io.BytesIO:
    """An item's data, as megatron-core makes them of leaves."""
    mine = [leaves[position].data for position in source.leaves]
    if source.shape is None:
        packed = io.BytesIO()
        torch.save(mine, packed)
        return packed
    tensor = mine[0].detach()
    return tensor if tensor.shape == source.shape else tensor.contiguous().view(source.shape)


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's, which plans; what it would then have written is ours."""

    planned: tuple["_Writer", Metadata | None]

    def _get_save_and_finalize_callbacks(self, writer: "_Writer", save_state_dict_ret: Any) -> AsyncRequest:
        self.planned = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


class _Writer(FileSystemWriterAsync):
    """megatron-core's, which is told of a plan's items and keeps them; it would copy every tensor that is a view."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        items = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)  # objects first, as it does
        self.keep(items, [planner.resolve_data(item) for item in items])

    def keep(self, items: list[WriteItem], data: list[Any]) -> None:
        self.items, self.data = items, data

    def take(self) -> Part:
        """The part; its data are the caller's alone, who lets go of them when they are written."""
        data, self.data = self.data, []
        tensors = iter(held(value for value in data if isinstance(value, torch.Tensor)))
        data = [next(tensors) if isinstance(value, torch.Tensor) else value for value in data]
        return Part(f"__{dist.get_rank()}_0{DEFAULT_SUFFIX}", list(zip(self.items, data, strict=True)), self.transforms)


@contextmanager
def _our_writer() -> Iterator[None]:
    """megatron-core's strategy tells our writer, for it names its own."""
    theirs, strategies.FileSystemWriterAsync = strategies.FileSystemWriterAsync, _Writer
    try:
        yield
    finally:
        strategies.FileSystemWriterAsync = theirs


def _write_index(writer: _Writer, index: Metadata | None, parts: list[Written]) -> None:
    assert index is not None, "rank 0 alone writes it"
    writer.finish(index, [part.results for part in parts])


def write_beside(extra: Callable[[Path], None] | None, directory: Path) -> None:
    """What lies beside the tensors and the index, on the disk. extra: adds files to the directory."""
    if extra is not None:
        extra(directory)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    for path in directory.rglob("*"):
        if not path.name.endswith(DEFAULT_SUFFIX):  # those are their writers'
            to_disk(path)
