"""The whole model put together from the shards of all ranks, without the checkpoint code that it helps to test."""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def whole_model(engine) -> dict[str, torch.Tensor] | None:
    """Checkpoint name -> whole tensor, on rank 0; None elsewhere. Every element must come from some rank.

    Every rank of the job calls it; engine: None on those that are not in its mesh.
    """
    mine = [] if engine is None else _mine(engine)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if dist.get_rank() != 0:
        return None
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (piece for part in every for piece in part):
        tensor = whole.setdefault(key, data.new_full(shape, torch.nan))
        place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
        seen = tensor[place]
        assert torch.equal(torch.where(seen.isnan(), data, seen), data), f"{key}: ranks hold different copies"
        tensor[place] = data
    holes = [key for key, tensor in whole.items() if tensor.isnan().any()]
    assert not holes, f"no rank holds all of {holes}"
    return whole


def _mine(engine) -> list:
    metadata = {"dp_cp_group": engine.mesh.groups.dp_cp, "singleton_local_shards": False}
    return [piece for module in engine.modules for piece in _pieces(module.sharded_state_dict(metadata=metadata))]


def _pieces(state):
    values = state.values() if isinstance(state, dict) else state
    for value in values:
        if isinstance(value, ShardedTensorFactory):
            yield from _pieces(value.build())
        elif isinstance(value, dict | list | tuple):
            yield from _pieces(value)
        elif isinstance(value, ShardedTensor):
            leading = value.global_offset[: value.prepend_axis_num]
            data = value.data.detach().clone().reshape((1,) * len(leading) + tuple(value.local_shape))
            yield value.key, tuple(value.global_shape), tuple(value.global_offset), data
