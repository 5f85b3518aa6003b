"""A distributed optimizer's state for a checkpoint, every rank its own part.

Each data-parallel rank holds a range of the elements of a parameter, counted row by row. For a checkpoint that other
layouts can load megatron-core gathers whole tensors: all of the state, on every rank, at every save, and one
rank then writes all. A range is a few boxes of the parameter, though: the end of a row, whole rows, the beginning of
one. Boxes are what a checkpoint is made of, so nothing is gathered, nothing copied, and all ranks write.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Sizes = tuple[int, ...]


def boxes(shape: Sizes, first: int, end: int) -> Iterator[tuple[Sizes, Sizes]]:
    """(offsets, sizes) of boxes that hold the elements [first, end) of a tensor, in order; each lies together."""
    if first >= end:
        return
    if len(shape) <= 1:
        yield (first,) * len(shape), (end - first,) * len(shape)
        return
    row = math.prod(shape[1:])
    (top, left), (bottom, right) = divmod(first, row), divmod(end, row)
    if top == bottom:
        yield from _within(shape, top, left, right)
        return
    if left:
        yield from _within(shape, top, left, row)
        top += 1
    if bottom > top:
        yield (top, *(0 for _ in shape[1:])), (bottom - top, *shape[1:])
    if right:
        yield from _within(shape, bottom, 0, right)


def _within(shape: Sizes, index: int, first: int, end: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Of one row."""
    for offsets, sizes in boxes(shape[1:], first, end):
        yield (index, *offsets), (1, *sizes)


def sharded_ranges(part: Any, by_parameter: dict[int, Any], prefix: str) -> dict[str, dict[str, Any]] | None:
    """What this rank holds of a distributed optimizer's state: by position of the parameter, then `param` or the name
    of the state, tensors by number. None where some parameter is saved in another order than its own.

    part: megatron-core's DistributedOptimizer. by_parameter: id of a model's parameter -> it as a sharded tensor.
    """
    found: dict[str, dict[str, Any]] = {}
    position = 0
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        mine = {p: at["param"] for buckets in ranges.values() for bucket in buckets
                for p, at in bucket["param_map"].items()}  # fmt: skip
        for parameter in buffer.param_index_map:
            pieces = _pieces(by_parameter[id(parameter)])
            if pieces is None:
                return None
            if parameter in mine:
                tensors = part._get_main_param_and_optimizer_states(parameter)
                found[str(position)] = {
                    name: _all_shards(pieces, tensor, mine[parameter].start, f"{prefix}.{name}")
                    for name, tensor in tensors.items()
                    if name != "step"
                }
            position += 1
    return found


def _pieces(sharded: Any) -> list[tuple[ShardedTensor, int]] | None:
    """The tensors that a parameter is in a checkpoint, and the first of its elements that each holds."""
    if isinstance(sharded, ShardedTensor):
        return [(sharded, 0)]
    assert isinstance(sharded, ShardedTensorFactory)
    whole = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    built = replace(sharded, data=whole).build()
    found = list(built.values()) if isinstance(built, dict) else list(built)
    for piece in found:
        if not isinstance(piece, ShardedTensor) or not piece.data.is_contiguous() or (
            piece.data.untyped_storage()._cdata != whole.untyped_storage()._cdata
        ):  # fmt: skip
            return None
    if sum(piece.data.numel() for piece in found) != whole.numel():
        return None
    return [(piece, piece.data.storage_offset()) for piece in found]


def _all_shards(
    pieces: list[tuple[ShardedTensor, int]], held: torch.Tensor, held_first: int, prefix: str
) -> dict[str, ShardedTensor]:
    found = [shard for piece, first in pieces for shard in _shards(piece, first, held, held_first, prefix)]
    return {str(number): shard for number, shard in enumerate(found)}


def _shards(
    piece: ShardedTensor, first: int, held: torch.Tensor, held_first: int, prefix: str
) -> Iterator[ShardedTensor]:
    """Boxes of a piece, whose first element is the parameter's number `first`, out of what this rank holds, whose first
    element is its number `held_first`."""
    shape = tuple(piece.local_shape)
    begins = max(held_first - first, 0)
    ends = min(held_first + held.numel() - first, math.prod(shape))
    flat = held.detach().view(-1)
    done = begins
    for offsets, sizes in boxes(shape, begins, ends):
        count = math.prod(sizes)
        place = first + done - held_first
        leading = tuple(piece.global_offset[: piece.prepend_axis_num])
        inside = piece.global_offset[piece.prepend_axis_num :]
        local = (1,) * piece.prepend_axis_num + sizes
        yield replace(
            piece,
            key=f"{prefix}.{piece.key}",
            data=flat[place : place + count].view(local),
            dtype=flat.dtype,
            local_shape=local,
            global_offset=leading + tuple(at + offset for at, offset in zip(inside, offsets, strict=True)),
            axis_fragmentations=None,  # of no regular grid
            prepend_axis_num=0,
            replica_id=(*piece.replica_id[:2], 0),  # every data-parallel rank has other elements
        )
        done += count
