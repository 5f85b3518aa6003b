"""megatron-core's self-attention with a pass for generation, whichever layers it is made of.

Shapes: t tokens of the row, n query heads and g key/value groups on this tensor-parallel rank, r = n/g, d head size.
"""

import math

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from scale_llm.models.kv_cache import CachedTokens
from scale_llm.models.ops import rotary, split_rotary


class CachedSelfAttention(SelfAttention):
    """Every other pass, parameters and their names are megatron-core's."""

    def forward(
        self,
        hidden_states,
        attention_mask,
        key_value_states=None,
        inference_context=None,
        rotary_pos_emb=None,
        **kwargs,
    ):
        packed = kwargs.get("packed_seq_params")
        if isinstance(packed, CachedTokens):
            return self.cached(hidden_states, rotary_pos_emb, packed)
        return super().forward(
            hidden_states, attention_mask, key_value_states, inference_context, rotary_pos_emb, **kwargs
        )

    def cached(self, hidden_states, angles, tokens: CachedTokens):
        """hidden_states [t, 1, h] (its part of t with sequence parallelism), angles [L, 1, 1, rot]
        -> (output like it, bias or None)."""
        mixed, _ = self.linear_qkv(hidden_states)
        if isinstance(angles, tuple):
            angles = angles[0]
        tables = None if angles is None else tokens.rotary_tables(angles, mixed.dtype)
        query, key, value = self.heads(mixed, tables)
        config = self.config
        scale = config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        window = None if config.window_size is None else config.window_size[0] + 1
        return self.linear_proj(tokens.attend(self.layer_number, query, key, value, scale=scale, window=window))

    def heads(self, mixed, tables):
        """[s, b, g * (r + 2) * d] -> query [s, b, g, r, d] or [s, b, n, d], key and value [s, b, g, d], normed and
        turned."""
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        # Transformer Engine's spec says no norm by an identity
        if all(norm is None or isinstance(norm, IdentityOp) for norm in (self.q_layernorm, self.k_layernorm)):
            return split_rotary(mixed, tables, groups=groups, head_size=size)
        query, key, value = split_rotary(mixed, None, groups=groups, head_size=size)
        query, key = self.q_layernorm(query.flatten(2, 3)), self.k_layernorm(key)
        if tables is not None:
            query, key = rotary(query, tables), rotary(key, tables)
        return query, key, value
