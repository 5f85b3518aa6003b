"""The low-rank matrices of one linear layer, cut over tensor-parallel ranks as the layer is.

The parts of a fused layer (queries, keys and values; gate and up) have matrices of their own, as Hugging Face's
adapters have, so that conversion is exact both ways; it is still two matrix products, over all parts at once.

Shapes: s sequence, b batch, p tensor-parallel ranks, r rank, n parts, R = n r; `in` and `out` those of the whole layer.
A column-parallel layer has out/p rows and its A is whole on every rank; a row-parallel one has in/p columns and its B
is whole.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from scale_llm.config.peft import PeftConfig, PeftMethod


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Where the rows of each part lie in the layer's output on this rank.

    groups: of queries with their key and value (linear_qkv), else 1; rows: part -> rows of it in one group, for all
    parts of the layer in order, those without an adapter too.
    """

    groups: int
    rows: dict[str, int]


class Matrix(torch.nn.Module):
    """A weight with a module's name, as checkpoints of adapters have them."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device))


class Part(torch.nn.Module):
    """linear_in is A [r, in or in/p], linear_out is B [rows, r], magnitude (DoRA) [rows]."""

    def __init__(self, rows: int, columns: int, rank: int, dora: bool, dtype, device):
        super().__init__()
        self.linear_in = Matrix(rank, columns, dtype, device)
        self.linear_out = Matrix(rows, rank, dtype, device)
        self.magnitude = torch.nn.Parameter(torch.ones(rows, dtype=dtype, device=device)) if dora else None


class LowRank(torch.nn.Module):
    """alpha/r B A x beside a layer's W x; with DoRA also a length for every row of W + alpha/r B A."""

    def __init__(self, layer, rows: Rows, names: list[str], peft: PeftConfig, *, row_parallel: bool):
        """layer: megatron-core's linear layer, built. names: the parts that get matrices."""
        super().__init__()
        self._rows, self._names, self._row_parallel = rows, names, row_parallel
        self._group, self._alone = layer.tp_group, layer.explicit_expert_comm
        self._sequence_parallel = layer.sequence_parallel and not self._alone
        self._dropout = peft.dropout
        self.scale = peft.alpha / (math.sqrt(peft.rank) if peft.use_rslora else peft.rank)
        self.dora = peft.method is PeftMethod.dora
        for name in names:
            part = Part(
                rows.groups * rows.rows[name], layer.weight.size(1), peft.rank, self.dora, layer.weight.dtype,
                layer.weight.device,
            )  # fmt: skip
            self.add_module(name, part)
            self._mark(part, layer)

    def _mark(self, part: Part, layer) -> None:
        """Tells megatron-core which gradients are sums over tensor-parallel ranks, and which parameters are shards."""
        whole = part.linear_out.weight if self._row_parallel else part.linear_in.weight
        cut = part.linear_in.weight if self._row_parallel else part.linear_out.weight
        set_tensor_model_parallel_attributes(cut, True, 1 if self._row_parallel else 0, 1)
        whole.sequence_parallel = self._sequence_parallel
        if part.magnitude is not None:
            part.magnitude.sequence_parallel = self._sequence_parallel and self._row_parallel
            if not self._row_parallel:
                set_tensor_model_parallel_attributes(part.magnitude, True, 0, 1)
        for parameter in part.parameters():
            parameter.allreduce = layer.weight.allreduce

    @property
    def parts(self) -> list[Part]:
        return [getattr(self, name) for name in self._names]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output for its input x [s or s/p, b, in or in/p]."""
        into, out = self.matrices()
        if self._alone:  # what an expert's dispatcher sums over ranks, weights' gradients included
            into, out = (into, self._summed(out)) if self._row_parallel else (self._summed(into), out)
        inner = F.linear(self._dropped(x), into) * self.scale
        if not self._alone and self._group.size() > 1:
            inner = self._across(inner)
        return F.linear(inner, out)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A of all parts above each other [R, in or in/p], and B in the layer's order of rows [out or out/p, R]: zero
        where rows and columns are of different parts."""
        into = torch.cat([part.linear_in.weight for part in self.parts])
        if len(self._rows.rows) == 1:
            return into, self.parts[0].linear_out.weight
        rank, blocks = self.parts[0].linear_in.weight.size(0), []
        for name, rows in self._rows.rows.items():
            if name not in self._names:
                blocks.append(into.new_zeros(self._rows.groups, rows, rank * len(self._names)))
                continue
            place = self._names.index(name)
            weight = getattr(self, name).linear_out.weight.view(self._rows.groups, rows, rank)
            blocks.append(F.pad(weight, (place * rank, (len(self._names) - 1 - place) * rank)))
        return into, torch.cat(blocks, dim=1).flatten(0, 1)

    def magnitude(self, lengths: torch.Tensor) -> torch.Tensor:
        """DoRA's length of every row in the layer's order [out or out/p]; rows without an adapter keep theirs."""
        blocks = [
            getattr(self, name).magnitude.view(self._rows.groups, rows) if name in self._names else block
            for (name, rows), block in zip(self._rows.rows.items(), self._blocks(lengths), strict=True)
        ]
        whole = torch.cat(blocks, dim=1).flatten()
        return self._summed(whole) if self._alone and self._row_parallel else whole

    @torch.no_grad()
    def start_magnitude(self, lengths: torch.Tensor) -> None:
        """DoRA begins with the lengths [out or out/p] that the rows of the base have."""
        for name, block in zip(self._rows.rows, self._blocks(lengths), strict=True):
            if name in self._names:
                getattr(self, name).magnitude.copy_(block.flatten())

    @torch.no_grad()
    def lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """Euclidean length of every row of W + alpha/r B A [out or out/p], FP32, no gradient (DoRA, section 4.3)."""
        into, out = self.matrices()
        squares = torch.addmm(weight, out, into, alpha=self.scale).float().square().sum(1)
        if self._row_parallel and self._group.size() > 1:
            torch.distributed.all_reduce(squares, group=self._group)
        return squares.sqrt()

    def _blocks(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """A vector over the layer's rows -> that of each part [groups, rows]."""
        return list(rows.view(self._rows.groups, -1).split(list(self._rows.rows.values()), dim=1))

    def _across(self, inner: torch.Tensor) -> torch.Tensor:
        """A x as every rank needs it: of the whole sequence (column-parallel), or summed over shards (row-parallel)."""
        if self._row_parallel:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self._sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return reduce(inner, group=self._group)
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self._group)
        return copy_to_tensor_model_parallel_region(inner, group=self._group)

    def _summed(self, weight: torch.Tensor) -> torch.Tensor:
        """The same weight, whose gradient is summed over the ranks that share an expert."""
        return copy_to_tensor_model_parallel_region(weight, group=self._group) if self._group.size() > 1 else weight

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout, other on ranks that hold other parts of x."""
        if not self._dropout or not self.training:
            return x
        if self._row_parallel or self._sequence_parallel:
            with get_cuda_rng_tracker().fork():
                return F.dropout(x, self._dropout)
        return F.dropout(x, self._dropout)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        axes = {}
        for name in self._names:
            if self._row_parallel:
                axes[f"{name}.linear_in.weight"] = 1
            else:
                axes |= {f"{name}.linear_out.weight": 0, f"{name}.magnitude": 0}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets, tp_group=self._group,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
