"""Keys and values of the tokens that sequences already have, so that each new token costs one token's work.

A forward pass of generation is a row [1, t] of tokens: first the latest token of each of n sequences, one a slot of the
cache; then the tokens before it of prompts that are new; then padding. Keys and values of all are put into the cache
first, so that the latest tokens attend to whole slots and those of a prompt to their own prompt.

Shapes: t tokens of the row, n slots in use, L places of a slot, g key/value groups and r query heads of each on this
tensor-parallel rank, d head size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from scale_llm.models.ops.attention import attention
from scale_llm.models.ops.rope import Tables, rotary_tables

UNIT = 64
"""Slots have a multiple of this many places."""
UNIT_READ = 16
"""Attention reads a multiple of this many of them, so that few shapes are seen."""
CHUNK = 8
"""Slots that attention reads at once on a CPU, up to the longest of them: 32 at once took 1.2 times as long where
lengths were 40 to 200. A GPU reads all at once."""


class KeyValueCache:
    """Storage of every layer of this rank, made when the layer first runs and kept."""

    def __init__(self, slots: int, length: int):
        """slots: sequences at once; length: tokens of the longest."""
        self.slots, self.length = slots, -(-length // UNIT) * UNIT
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tables: tuple[torch.Tensor, Tables] | None = None

    def of_layer(self, number: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [slots, g, L, d]. like: keys [t, 1, g, d]."""
        if number not in self._layers:
            shape = (self.slots, like.size(2), self.length, like.size(3))
            # Zeros: places that no token has are masked, but NaN in them would spread all the same
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]

    def rotary_tables(self, angles: torch.Tensor, dtype: torch.dtype) -> Tables:
        """Cosine and sine [L, 1, 1, rot/2] of angles [L, 1, 1, rot], made once."""
        if self._tables is None or self._tables[0] is not angles:
            self._tables = (angles, rotary_tables(angles, dtype))
        return self._tables[1]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of a slot over another's."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


@dataclass(kw_only=True)
class CachedTokens(PackedSeqParams):
    """What attention must know of such a row; it travels where megatron-core carries packed sequences.

    positions: int64 [t], of each token within its sequence. lengths: tokens of each of the n sequences, the latest
    included, on the host. prompts: (slot, first token in the row, tokens) of each new prompt without its last token.
    """

    cache: KeyValueCache
    positions: torch.Tensor
    lengths: tuple[int, ...]
    prompts: tuple[tuple[int, int, int], ...]
    _tables: Tables | None = field(default=None, repr=False)
    _reads: list[tuple[slice, int, torch.Tensor]] | None = field(default=None, repr=False)

    def __post_init__(self):
        self.qkv_format = "thd"
        self.max_seqlen_q = self.max_seqlen_kv = self.cache.length  # one table of angles for all rows

    @property
    def sequences(self) -> int:
        """n."""
        return len(self.lengths)

    def rotary_tables(self, angles: torch.Tensor, dtype: torch.dtype) -> Tables:
        """Cosine and sine [t, 1, 1, rot/2] at every token's position, made once for all layers of this rank."""
        if self._tables is None:
            cos, sin = self.cache.rotary_tables(angles, dtype)
            self._tables = (cos[self.positions], sin[self.positions])
        return self._tables

    def attend(self, layer: int, query, key, value, *, scale: float, window: int | None) -> torch.Tensor:
        """query [t, 1, g, r, d], or [t, 1, g * r, d]; key, value [t, 1, g, d] -> [t, 1, g * r * d], 0 for padding."""
        g, d = key.shape[2:]
        query = query.reshape(query.size(0), g, -1, d)
        keys, values = self.cache.of_layer(layer, key)
        n = self.sequences
        self._store(keys, key)
        self._store(values, value)
        parts = []
        if n:
            parts.append(self._latest(query[:n], keys[:n], values[:n], scale, window))
        for _, start, length in self.prompts:
            rows = slice(start, start + length)
            found = attention(query[rows, None], key[rows], value[rows], scale=scale, window=window)
            parts.append(found[:, 0])
        padding = query.size(0) - n - sum(length for *_, length in self.prompts)
        if padding:
            parts.append(query.new_zeros(padding, query[0].numel()))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(1)

    def _store(self, cache: torch.Tensor, new: torch.Tensor) -> None:
        """new [t, 1, g, d] into cache [slots, g, L, d]."""
        n = self.sequences
        cache.transpose(1, 2)[torch.arange(n, device=new.device), self.positions[:n]] = new[:n, 0]
        for slot, start, length in self.prompts:
            cache[slot, :, :length] = new[start : start + length, 0].transpose(0, 1)

    def _latest(self, query, keys, values, scale, window):
        """query [n, g, r, d], keys and values [n, g, L, d] -> [n, g * r * d]."""
        if self._reads is None:
            self._reads = self._planned(query, window)
        # The r query heads of a group stand in the place of r queries: its keys are read once.
        parts = [
            F.scaled_dot_product_attention(
                query[slots], keys[slots, :, :read], values[slots, :, :read], attn_mask=mask, scale=scale
            )
            for slots, read, mask in self._reads
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _planned(self, like: torch.Tensor, window: int | None) -> list[tuple[slice, int, torch.Tensor]]:
        """Slots that are read at once, how many places of them, and what is added to their scores [slots, 1, 1,
        places], 0 or -inf."""
        n = self.sequences
        size = CHUNK if like.device.type == "cpu" else n
        found = []
        for start in range(0, n, size):
            slots = slice(start, min(start + size, n))
            read = min(-(-max(self.lengths[slots]) // UNIT_READ) * UNIT_READ, self.cache.length)
            places, last = torch.arange(read, device=like.device), self.positions[slots, None]
            hidden = places > last
            if window is not None:
                hidden = hidden | (places <= last - window)
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            found.append((slots, read, mask[:, None, None]))
        return found
