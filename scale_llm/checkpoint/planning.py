"""Which rank writes which tensor where, as megatron-core plans it; a plan serves until the state's structure changes.

A plan costs several exchanges between all ranks, which compare what they hold (every tensor is written once and whole)
and tell rank 0 what will lie in their files.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType

from scale_llm.checkpoint.part_writer import Part, Written
from scale_llm.checkpoint.snapshot import held
from scale_llm.checkpoint.summed_file import to_disk

Structure = list[tuple[Any, ...]]
"""Everything about a state that a plan depends on, of this rank."""


class Planning:
    """Plans saves of one run. All methods are called by every rank."""

    def __init__(self) -> None:
        self._strategy = _Strategy()
        self._structure: Structure | None = None
        self._next: Structure = []

    def prepare(self, state: dict[str, Any]) -> tuple[bool, int]:
        """(whether the last plan fits no more, bytes that this rank will write). No collective; applies factories."""
        apply_factories(state)
        leaves = list(nested_values(state))
        tensors = [leaf for leaf in leaves if isinstance(leaf, ShardedTensor)]
        structure = [_of_tensor(leaf) for leaf in tensors]
        structure += [_of_object(leaf) for leaf in leaves if isinstance(leaf, ShardedObject)]
        changed, self._next = structure != self._structure, structure
        mine = (leaf.data for leaf in tensors if is_main_replica(leaf.replica_id))
        return changed, sum(data.numel() * data.element_size() for data in mine)

    def plan(
        self, state: dict[str, Any], directory: Path, *, anew: bool
    ) -> tuple[Part, Callable[[list[Written]], None]]:
        """Takes hold of the state as it is; rank 0 writes common.pt. Returns this rank's part and what writes
        `.metadata` on rank 0, given what all ranks wrote. Collective where `anew`, and the next time.

        anew: the structure has changed on some rank.

        Raises:
            CheckpointingException: ranks hold parts that do not make a whole.
        """
        self._structure = None  # until it is known to be right
        if anew:
            self._strategy = _Strategy()
        with _our_writer():
            dist_checkpointing.save(
                state, str(directory), self._strategy, validate_access_integrity=anew, async_sharded_save=True
            )
        self._structure = self._next
        return self._strategy.take()


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's, which plans; what it would then have written is ours."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1, cached_metadata=True)

    def _get_save_and_finalize_callbacks(self, writer: "_Writer", save_state_dict_ret: Any) -> AsyncRequest:
        self._writer, self._index = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])

    def take(self) -> tuple[Part, Callable[[list[Written]], None]]:
        """What the last plan was for; it holds on to tensors, so only once."""
        writer, index = self._writer, self._index
        del self._writer, self._index
        return writer.take(), partial(_write_index, writer, index)


def _write_index(writer: "_Writer", index: Metadata, parts: list[Written]) -> None:
    writer.finish(index, [part.results for part in parts])


class _Writer(FileSystemWriterAsync):
    """megatron-core's, which is told of a plan's items and keeps them; it would copy every tensor that is a view."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        items = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)  # objects first, as it does
        data = [planner.resolve_data(item) for item in items]
        tensors = held(value for value in data if isinstance(value, torch.Tensor))
        objects = data[: len(data) - len(tensors)]
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self._part = Part(name, list(zip(items, objects + tensors, strict=True)), self.transforms)

    def take(self) -> Part:
        part = self._part
        del self._part
        return part

    def get_save_function_and_args(self) -> tuple[None, None, list]:
        return None, None, []


@contextmanager
def _our_writer() -> Iterator[None]:
    """megatron-core's strategy tells our writer, for it names its own."""
    theirs, strategies.FileSystemWriterAsync = strategies.FileSystemWriterAsync, _Writer
    try:
        yield
    finally:
        strategies.FileSystemWriterAsync = theirs


def _of_tensor(leaf: ShardedTensor) -> tuple[Any, ...]:
    return (leaf.key, leaf.dtype, tuple(leaf.local_shape), tuple(leaf.global_shape), tuple(leaf.global_offset),
            leaf.axis_fragmentations, leaf.replica_id, leaf.prepend_axis_num, str(leaf.flattened_range))  # fmt: skip


def _of_object(leaf: ShardedObject) -> tuple[Any, ...]:
    return leaf.key, tuple(leaf.global_shape), tuple(leaf.global_offset), leaf.replica_id


def write_beside(extra: Callable[[Path], None] | None, directory: Path) -> None:
    """What lies beside the tensors and the index, on the disk. extra: adds files to the directory."""
    if extra is not None:
        extra(directory)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    for path in directory.rglob("*"):
        if not path.name.endswith(DEFAULT_SUFFIX):  # those are their writers'
            to_disk(path)
