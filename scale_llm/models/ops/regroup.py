"""A row of sequences as batches of sequences of about one length, and back: attention is then a few calls, whatever the
number of sequences. Both ways, and both gradients, are gathers.

Shapes: t places of the row, L and n length and number of a batch's sequences, f features.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

UNIT = 64
"""Lengths are rounded up to a multiple of this: fewer, larger batches against more padding in them."""


@dataclass(frozen=True, slots=True)
class Batches:
    """shapes: (L, n) of each batch. places: [cells], the place of the row that each cell of the batches holds, batch
    after batch, and `padding` the cells that hold none; cells: [t], the cell that holds each place, and `free` the
    places that are in none. What has no counterpart has the number 0."""

    shapes: tuple[tuple[int, int], ...]
    places: torch.Tensor
    padding: torch.Tensor
    cells: torch.Tensor
    free: torch.Tensor

    def to(self, device: torch.device) -> "Batches":
        moved = (x.to(device, non_blocking=True) for x in (self.places, self.padding, self.cells, self.free))
        return Batches(self.shapes, *moved)


def batches_of(lengths: tuple[int, ...], total: int) -> Batches:
    """Batches for sequences that lie one behind the other in a row of `total` places."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    starts = sizes.cumsum(0) - sizes
    rounded = -(-sizes // UNIT) * UNIT
    shapes, parts, kept = [], [], []
    for length in sorted(set(rounded.tolist())):
        chosen = (rounded == length).nonzero()[:, 0]
        step = torch.arange(length)[:, None]
        parts.append((step + starts[chosen]).flatten())
        kept.append((step < sizes[chosen]).flatten())
        shapes.append((length, chosen.numel()))
    places, real = (torch.cat(parts), torch.cat(kept)) if shapes else (sizes, sizes.bool())
    places = places.where(real, 0)
    cells = torch.full((total,), -1)
    cells[places[real]] = real.nonzero()[:, 0]
    free = (cells < 0).nonzero()[:, 0]
    return Batches(tuple(shapes), places, (~real).nonzero()[:, 0], cells.clamp(min=0), free)


def to_batches(row: torch.Tensor, batches: Batches) -> tuple[torch.Tensor, ...]:
    """[t, 1, f] -> [L, n, f] of every batch; what padding holds is not to be used."""
    return _ToBatches.apply(row, batches)


def to_row(parts: list[torch.Tensor], batches: Batches) -> torch.Tensor:
    """[L, n, f] of every batch -> [t, 1, f], 0 in places that no sequence has."""
    return _ToRow.apply(batches, *parts)


class _ToBatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row, batches):
        ctx.batches = batches
        return _split(row[:, 0].index_select(0, batches.places), batches)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return _gathered(grads, ctx.batches), None


class _ToRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batches, *parts):
        ctx.batches = batches
        return _gathered(parts, batches)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        batches = ctx.batches
        cells = grad[:, 0].index_select(0, batches.places)
        cells.index_fill_(0, batches.padding, 0)
        return None, *_split(cells, batches)


def _split(cells: torch.Tensor, batches: Batches) -> tuple[torch.Tensor, ...]:
    parts = cells.split([length * count for length, count in batches.shapes])
    return tuple(part.unflatten(0, shape) for part, shape in zip(parts, batches.shapes, strict=True))


def _gathered(parts, batches: Batches) -> torch.Tensor:
    cells = torch.cat([part.flatten(0, 1) for part in parts])
    row = cells.index_select(0, batches.cells)
    return row.index_fill_(0, batches.free, 0).unsqueeze(1)
