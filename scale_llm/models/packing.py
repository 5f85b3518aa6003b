"""Several sequences in one row: where each begins, for attention and positions that never cross a boundary."""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from scale_llm.models.ops.regroup import Batches, batches_of
from scale_llm.models.ops.rope import Tables, rotary_tables
from scale_llm.parallel.context import shard_sequence


@dataclass
class PackedSequences(PackedSeqParams):
    """megatron-core's description of a row [1, t] of whole sequences, and the same on the host.

    lengths: tokens of each sequence, in order; what the row holds after them is padding.
    positions: int64 [t/c], of each token of this context-parallel rank within its sequence.
    length_of_place: float [t/c, 1, 1], the length of the sequence that a token belongs to.
    batches: the sequences by length, for attention where the row is not cut over ranks.
    """

    lengths: tuple[int, ...] = ()
    positions: torch.Tensor | None = None
    length_of_place: torch.Tensor | None = None
    batches: Batches | None = None
    _tables: tuple[torch.Tensor, Tables] | None = field(default=None, repr=False)

    def rotary_tables(self, angles: torch.Tensor, dtype: torch.dtype) -> Tables:
        """Cosine and sine [t/c, 1, 1, rot/2] at every token's position, made once for all layers.

        angles: [longest sequence, 1, 1, rot].
        """
        if self._tables is None or self._tables[0] is not angles:
            cos, sin = rotary_tables(angles, dtype)
            self._tables = (angles, (cos[self.positions], sin[self.positions]))
        return self._tables[1]

    def parts(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """The sequences that tokens start..end of the row belong to: (first token of the sequence, first and last + 1
        of these tokens in it)."""
        found, first = [], 0
        for length in self.lengths:
            low, high = max(first, start), min(first + length, end)
            if low < high:
                found.append((first, low, high))
            first += length
        return found


def packed_sequences(
    boundaries: torch.Tensor, position_ids: torch.Tensor, cp_group, device: torch.device, *, fused: bool
) -> PackedSequences:
    """boundaries: int32 [n + 1] on the host, the first token of each sequence and the end of the last; position_ids:
    [1, t/c], this rank's. fused: attention is Transformer Engine's, which takes padding for one more sequence."""
    ends = boundaries.tolist()
    lengths = tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
    total = position_ids.size(1) * (cp_group.size() if cp_group is not None else 1)
    if fused and ends[-1] < total:
        boundaries = torch.cat([boundaries, boundaries.new_tensor([total])])
    on_device = boundaries.to(device, non_blocking=True)
    longest = max((*lengths, total - ends[-1], 1))
    batches = None
    if not fused and (cp_group is None or cp_group.size() == 1) and lengths:
        batches = batches_of(lengths, total).to(device)
        longest = batches.shapes[-1][0]
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        positions=position_ids[0],
        batches=batches,
        length_of_place=shard_sequence(_lengths_of_places(lengths, total), 0, cp_group).to(device, non_blocking=True),
    )


def _lengths_of_places(lengths: tuple[int, ...], total: int) -> torch.Tensor:
    """[t, 1, 1]; padding is one more sequence."""
    counts = torch.tensor([*lengths, max(total - sum(lengths), 0)])
    return torch.repeat_interleave(counts.float(), counts)[:, None, None]
