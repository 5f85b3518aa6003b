"""An exact sum of the bits of a tensor's elements, each weighted by its place in the whole tensor.

Whole numbers that wrap around: the sum of all shards is the same whatever the layout and the order. Weights are odd, so
that no single wrong element goes unseen.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch

from scale_llm.engine.movement_plan import Box, Shard

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WRAP = (1 << 64) - 1


def sum_of_bits(data: torch.Tensor, box: Box, whole: tuple[int, ...], dtype: torch.dtype, most: int) -> int:
    """0 to 2^64 - 1, of the data as `dtype`. box: where the data lies in a tensor of shape `whole`; its first axis may
    have any length. most: elements at a time; each takes some 40 bytes meanwhile."""
    total = 0
    for part in box.parts(most):
        values = data[part.within(box)].to(dtype).contiguous()
        bits = values.view(_INTEGERS[values.element_size()]).long()
        total += int((bits * _weights(_places(part, whole, data.device))).sum())
    return total & _WRAP


def _places(part: Box, whole: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Of every element its number in the whole tensor, row by row; int64, shaped like the part."""
    places = torch.zeros(part.shape, dtype=torch.int64, device=device)
    stride = 1
    for axis in reversed(range(len(whole))):
        along = torch.arange(part.start[axis], part.start[axis] + part.shape[axis], device=device) * stride
        places += along.view([-1 if other == axis else 1 for other in range(len(whole))])
        stride *= whole[axis]
    return places


def _weights(places: torch.Tensor) -> torch.Tensor:
    """Odd numbers that look random, in place."""
    places.mul_(-7046029254386353131)  # 2^64 divided by the golden ratio, as Knuth's multiplicative hash has it
    return places.bitwise_xor_(places >> 29).mul_(-4658895280553007687).bitwise_or_(1)


def differences(
    source: Iterable[tuple[str, int]], targets: Sequence[Sequence[Shard]], sums: Sequence[Sequence[int]]
) -> list[str]:
    """What is wrong, a line a tensor; [] where all is right.

    source: sums by tensor, which together hold every element once. targets, sums: every rank's shards and their sums.
    """
    expected: Counter[str] = Counter()
    for name, value in source:
        expected[name] += value
    copies: dict[str, dict[Box, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for rank, (mine, values) in enumerate(zip(targets, sums, strict=True)):
        for shard, value in zip(mine, values, strict=True):
            copies[shard.name][shard.box][rank] = value
    found = []
    for name, boxes in copies.items():
        unlike = [ranks for ranks in boxes.values() if len(set(ranks.values())) > 1]
        if unlike:
            found.append(f"{name}: ranks {sorted({rank for ranks in unlike for rank in ranks})} hold different copies")
        elif (sum(next(iter(ranks.values())) for ranks in boxes.values()) - expected[name]) & _WRAP:
            found.append(f"{name}: the target's bits are not the source's")
    return found
