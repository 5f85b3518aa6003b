"""Layers for megatron-core's specs from the operations of `models.ops`, where Transformer Engine is absent.

Shapes: s sequence, b batch, h hidden, n query heads and g key/value groups on this tensor-parallel rank, r = n/g, d
head size, c ranks of context parallelism. Activations are [s/c, b, ...].
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from scale_llm.models.cached_attention import CachedSelfAttention
from scale_llm.models.kv_cache import CachedTokens
from scale_llm.models.ops import (
    attention,
    attention_of_sequences,
    rms_norm,
    rotary_tables,
    swiglu,
    takes_heads,
    to_batches,
    to_row,
)
from scale_llm.models.packing import PackedSequences
from scale_llm.parallel.context import gather_sequence, sequence_chunks


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight knows whether its gradient must be summed over tensor-parallel ranks."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class TorchLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose parameters know whether their gradients must be summed over tensor-parallel ranks."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel


class Activation:
    """The MLP's activation: SwiGLU over [gate, up], or what the configuration names. No module: it has no state."""

    def __init__(self, config):
        self.function = swiglu if config.gated_linear_unit else config.activation_func
        assert not config.gated_linear_unit or config.activation_func is F.silu

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class TorchSelfAttention(CachedSelfAttention):
    """megatron-core's self-attention, whose training pass splits, turns and attends without copies between.

    Parameters and their names are megatron-core's; so is the pass with an inference context.
    """

    _tables: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(
        self,
        hidden_states,
        attention_mask,
        key_value_states=None,
        inference_context=None,
        rotary_pos_emb=None,
        **kwargs,
    ):
        """hidden_states [s/c, b, h], mask [b, 1, s/c, s] True where hidden, rotary angles [s/c, 1, 1, rot]
        -> (output [s/c, b, h], bias or None)."""
        packed = kwargs.get("packed_seq_params")
        if isinstance(packed, CachedTokens):
            return self.cached(hidden_states, rotary_pos_emb, packed)
        if inference_context is not None:
            return super().forward(
                hidden_states, attention_mask, key_value_states, inference_context, rotary_pos_emb, **kwargs
            )
        mixed, _ = self.linear_qkv(hidden_states)
        if packed is None or packed.batches is None or self.core_attention.takes_rows(mixed):
            tables = None if rotary_pos_emb is None else self._tables_of(rotary_pos_emb, mixed.dtype, packed)
            return self.linear_proj(self._context(mixed, tables, attention_mask, packed))
        tables = None if rotary_pos_emb is None else self._tables_of(rotary_pos_emb, mixed.dtype, None)
        parts = []
        for part in to_batches(mixed, packed.batches):
            first = None if tables is None else (tables[0][: part.size(0)], tables[1][: part.size(0)])
            parts.append(self._context(part, first, None))
        return self.linear_proj(to_row(parts, packed.batches))

    def _context(self, mixed, tables, attention_mask, packed: PackedSequences | None = None):
        """Queries, keys and values [s/c, b, g * (r + 2) * d] -> what they attend to [s/c, b, n*d]."""
        query, key, value = self.heads(mixed, tables)
        attend = self._checkpointed_attention_forward if self._recomputes() else self.core_attention
        return attend(query, key, value, attention_mask, attn_mask_type=self.attn_mask_type, packed_seq_params=packed)

    def _recomputes(self) -> bool:
        return self.checkpoint_core_attention and self.training

    def _tables_of(self, angles, dtype, packed: PackedSequences | None):
        """Cosines and sines; megatron-core hands the same angles to every layer and step."""
        if isinstance(angles, tuple):
            angles = angles[0]
        if packed is not None:
            return packed.rotary_tables(angles, dtype)
        if self._tables is None or self._tables[0] is not angles:
            self._tables = (angles, rotary_tables(angles, dtype))
        return self._tables[1]


class TorchAttention(torch.nn.Module):
    """Causal attention, grouped queries and context parallelism included.

    With context parallelism every rank holds two chunks of the sequence, r and 2c-1-r, so that causal work is even;
    keys and values are gathered over the ranks, and each chunk of queries sees the keys up to its own end.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
        cp_comm_type=None, pg_collection=None,
    ):  # fmt: skip
        super().__init__()
        self.cp_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = None if config.window_size is None else config.window_size[0] + 1
        self.head_size = config.kv_channels
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """query [s/c, b, n, d] or [s/c, b, g, r, d]; key, value [s/c, b, g, d]; mask [b, 1, s/c, s] True where hidden
        -> [s/c, b, n*d]. packed_seq_params: the row holds several sequences, and b is 1."""
        assert attention_bias is None
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp_group is not None and self.cp_group.size() > 1:
            return self._context_parallel(query, key, value, attention_mask)
        causal = attn_mask_type is not AttnMaskType.no_mask
        return self._attend(query, key, value, hidden=attention_mask, causal=causal)

    def takes_rows(self, x) -> bool:
        """Whether it takes rows of several sequences as they are, with numbers of the type of x."""
        whole = self.window is None and self._dropout() == 0.0
        return whole and takes_heads(x.dtype, x.device, self.head_size)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _attend(self, query, key, value, **where):
        return attention(query, key, value, scale=self.scale, dropout_p=self._dropout(), window=self.window, **where)

    def _packed(self, query, key, value, packed: PackedSequences):
        """Each sequence attends to itself alone; padding, which nothing reads, gives 0."""
        if packed.batches is not None and self.takes_rows(query):
            return attention_of_sequences(query, key, value, packed.cu_seqlens_q, scale=self.scale)
        chunk = query.size(0)
        chunks: tuple[int, ...] = (0,)
        if self.cp_group is not None and self.cp_group.size() > 1:
            key, value = gather_sequence(key, self.cp_group), gather_sequence(value, self.cp_group)
            chunk, chunks = chunk // 2, sequence_chunks(self.cp_group)
        outs = []
        for half, index in enumerate(chunks):
            start, end = index * chunk, (index + 1) * chunk  # of the row; its queries begin at half * chunk here
            for first, low, high in packed.parts(start, end):
                rows = slice(low - start + half * chunk, high - start + half * chunk)
                outs.append(self._attend(query[rows], key[first:high], value[first:high]))
            padding = end - max(start, min(end, sum(packed.lengths)))
            if padding:  # 0 that has a gradient: ranks without a sequence take part in what is done for gradients
                last = slice((half + 1) * chunk - padding, (half + 1) * chunk)
                outs.append(query[last].flatten(2) * 0 + (key[:1].sum() + value[:1].sum()) * 0)
        return torch.cat(outs)

    def _context_parallel(self, query, key, value, attention_mask):
        keys, values = gather_sequence(key, self.cp_group), gather_sequence(value, self.cp_group)  # [s, b, g, d]
        chunk = query.size(0) // 2
        outs = []
        for half, index in enumerate(sequence_chunks(self.cp_group)):
            rows, end = slice(half * chunk, (half + 1) * chunk), (index + 1) * chunk
            hidden = None if attention_mask is None else attention_mask[:, :, rows, :end]
            outs.append(self._attend(query[rows], keys[:end], values[:end], hidden=hidden))
        return torch.cat(outs)
