"""Initial weights that depend on the seed and on global names alone, never on the layout.

Every parameter is drawn for its name in the checkpoint (which is the same under any layout) from a counter-based
generator (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that a rank draws just its
own rows. Megatron's rule for the values: normal with `init_method_std`, divided by sqrt(2 * layers) for the projections
that write to the residual stream; norms 1, biases 0.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from scale_llm.parallel.mesh import Mesh

_NORMALS_PER_BLOCK = 8  # one Philox block: four 64-bit words, two 32-bit uniforms each
_BLOCKS_PER_PART = 1 << 12
"""Drawn at a time by one thread: what lies between stays in a cache, and torch divides no smaller tensors itself."""
_SCALED = ("linear_proj.weight", "linear_fc2.weight")


def initialise(chunks: Sequence, config, mesh: Mesh, *, seed: int) -> None:
    """Draws every parameter of this rank's model chunks in place."""
    metadata = {"dp_cp_group": mesh.groups.dp_cp, "singleton_local_shards": False}
    drawn = set()
    with torch.no_grad():
        for chunk in chunks:
            for shard in shards(chunk.sharded_state_dict(metadata=metadata)):
                shard.data.copy_(draw_shard(shard, config, seed))
                drawn.add(shard.data.untyped_storage().data_ptr())
            missed = [n for n, p in chunk.named_parameters() if p.untyped_storage().data_ptr() not in drawn]
            assert not missed, f"parameters without an initial value: {missed}"


def shards(state) -> Iterator[ShardedTensor]:
    """Every tensor of a sharded state dict as it is saved: views of the parameters, whose factories are applied."""
    values = state.values() if isinstance(state, dict) else state
    for value in values:
        if isinstance(value, ShardedTensorFactory):
            yield from shards(value.build())
        elif isinstance(value, dict | list | tuple):
            yield from shards(value)
        elif isinstance(value, ShardedTensor):
            yield value


def draw_shard(shard: ShardedTensor, config, seed: int) -> torch.Tensor:
    """Values of one shard, in FP32, shaped like its data."""
    key, leading = shard.key, shard.prepend_axis_num
    if ".adapter." in key:
        return _draw_adapter(shard, seed)
    if key.endswith(("bias", "layer_norm_bias")):
        return torch.zeros(shard.local_shape)
    if key.endswith(("layer_norm_weight", "layernorm.weight")):
        return torch.ones(shard.local_shape)
    std = config.init_method_std
    if key.endswith(_SCALED):
        std /= math.sqrt(2.0 * config.num_layers)
    name = f"{seed}/{key}/{'.'.join(map(str, shard.global_offset[:leading]))}"
    values = normal_slice(name, shard.global_shape[leading:], shard.global_offset[leading:], shard.local_shape)
    return torch.from_numpy(values * np.float32(std))


def _draw_adapter(shard: ShardedTensor, seed: int) -> torch.Tensor:
    """A low-rank adapter changes nothing at first: B is 0. A has the variance of torch's linear layers, 1/(3 in)."""
    key, leading = shard.key, shard.prepend_axis_num
    if not key.endswith("linear_in.weight"):
        return torch.zeros(shard.local_shape) if key.endswith("weight") else torch.ones(shard.local_shape)
    name = f"{seed}/{key}/{'.'.join(map(str, shard.global_offset[:leading]))}"
    values = normal_slice(name, shard.global_shape[leading:], shard.global_offset[leading:], shard.local_shape)
    return torch.from_numpy(values / np.float32(math.sqrt(3.0 * shard.global_shape[-1])))


def normal_slice(name: str, shape: Sequence[int], offset: Sequence[int], local_shape: Sequence[int]) -> np.ndarray:
    """The part at `offset` of a standard normal tensor of `shape` that the name determines; FP32."""
    row = math.prod(shape[1:])
    rows = normals(name, offset[0] * row, (offset[0] + local_shape[0]) * row).reshape(local_shape[0], *shape[1:])
    inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], local_shape[1:], strict=True))
    return np.ascontiguousarray(rows[(slice(None), *inner)])


def normals(name: str, start: int, stop: int) -> np.ndarray:
    """Elements start..stop of the infinite sequence of standard normals that the name determines; FP32.

    Box and Muller's transform of two 32-bit uniforms gives two normals and, unlike rejection methods, uses a fixed
    number of random words.
    """
    first, last = start // _NORMALS_PER_BLOCK, -(-stop // _NORMALS_PER_BLOCK)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    out = torch.empty(((last - first) * _NORMALS_PER_BLOCK // 2, 2), dtype=torch.float32)

    def draw(part: range) -> None:
        pairs = _NORMALS_PER_BLOCK // 2
        _draw_pairs(key, part, out[(part.start - first) * pairs : (part.stop - first) * pairs])

    parts = [range(i, min(i + _BLOCKS_PER_PART, last)) for i in range(first, last, _BLOCKS_PER_PART)]
    if len(parts) == 1 or torch.get_num_threads() == 1:
        for part in parts:
            draw(part)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(draw, parts))
    skip = start - first * _NORMALS_PER_BLOCK
    return out.view(-1)[skip : skip + stop - start].numpy()


def _draw_pairs(key: int, blocks: range, out: torch.Tensor) -> None:
    """Normals of these blocks of the generator into out [n, 2]."""
    words = np.random.Philox(key=key).advance(blocks.start).random_raw(4 * len(blocks)).view(np.uint32)
    uniforms = torch.from_numpy(words.astype(np.float64)).view(-1, 2)
    radius = torch.sqrt(torch.log((uniforms[:, 0] + 1.0) * 2.0**-32) * -2.0)
    angle = uniforms[:, 1] * (2.0 * np.pi * 2.0**-32)
    torch.mul(radius, torch.cos(angle), out=out[:, 0])
    torch.mul(radius, torch.sin(angle), out=out[:, 1])
