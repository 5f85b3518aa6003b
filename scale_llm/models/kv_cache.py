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
"""Slots have a multiple of this many places, and attention reads a multiple of UNIT_READ of them: few shapes are seen."""
UNIT_READ = 16


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


@dataclass
class CachedTokens(PackedSeqParams):
    """What attention must know of such a row; it travels where megatron-core carries packed sequences.

    positions: int64 [t], of each token within its sequence. sequences: n. longest: tokens of the longest sequence, the
    latest included. prompts: (slot, first token in the row, tokens) of each new prompt without its last token.
    """

    cache: KeyValueCache | None = None
    positions: torch.Tensor | None = None
    sequences: int = 0
    longest: int = 0
    prompts: tuple[tuple[int, int, int], ...] = ()
    _tables: Tables | None = field(default=None, repr=False)
    _mask: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        self.qkv_format = "thd"
        self.max_seqlen_q = self.max_seqlen_kv = self.cache.length  # one table of angles for all rows

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
        read = min(-(-self.longest // UNIT_READ) * UNIT_READ, keys.size(2))
        if self._mask is None:
            self._mask = self._hidden(read, window).to(query.dtype)
        # The r query heads of a group stand in the place of r queries: its keys are read once.
        out = F.scaled_dot_product_attention(
            query, keys[:, :, :read], values[:, :, :read], attn_mask=self._mask, scale=scale
        )
        return out.flatten(1)

    def _hidden(self, read: int, window: int | None) -> torch.Tensor:
        """[n, 1, 1, read]: what is added to scores, 0 or -inf."""
        places = torch.arange(read, device=self.positions.device)
        last = self.positions[: self.sequences, None]
        hidden = places > last
        if window is not None:
            hidden = hidden | (places <= last - window)
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None, None]
