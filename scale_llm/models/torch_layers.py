"""Layers for megatron-core's specs from torch's fused kernels, where Transformer Engine is absent.

Shapes: s sequence, b batch, h hidden, n heads and g key/value groups on this tensor-parallel rank, d head size, c ranks
of context parallelism. Activations are [s/c, b, ...].
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from scale_llm.parallel.context import gather_sequence, sequence_chunks


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight knows whether its gradient must be summed over tensor-parallel ranks."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class TorchLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose parameters know whether their gradients must be summed over tensor-parallel ranks."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel


class TorchAttention(torch.nn.Module):
    """Causal attention by scaled_dot_product_attention, grouped queries and context parallelism included.

    With context parallelism every rank holds two chunks of the sequence, r and 2c-1-r, so that causal work is even; keys
    and values are gathered over the ranks, and each chunk of queries sees the keys up to its own end.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
        cp_comm_type=None, pg_collection=None,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        self.cp_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """query [s/c, b, n, d], key and value [s/c, b, g, d], mask [b, 1, s/c, s] True where hidden -> [s/c, b, n*d]."""
        assert packed_seq_params is None and attention_bias is None
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s/c, d]
        causal = attn_mask_type is not AttnMaskType.no_mask
        if self.cp_group is not None and self.cp_group.size() > 1:
            out = self._context_parallel(q, key, value, attention_mask)
        elif attention_mask is not None:
            out = self._attend(q, k, v, mask=~attention_mask)
        elif causal and q.size(2) != k.size(2):
            out = self._attend(q, k, v, mask=_causal_tail(q.size(2), k.size(2), q.device))
        else:
            out = self._attend(q, k, v, causal=causal)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _attend(self, q, k, v, *, mask=None, causal=False):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=q.size(1) != k.size(1),
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def _context_parallel(self, q, key, value, attention_mask):
        keys, values = (gather_sequence(x, self.cp_group).permute(1, 2, 0, 3) for x in (key, value))  # [b, g, s, d]
        chunk = q.size(2) // 2
        outs = []
        for half, index in enumerate(sequence_chunks(self.cp_group)):
            rows = slice(half * chunk, (half + 1) * chunk)
            end = (index + 1) * chunk
            if attention_mask is not None:
                mask = ~attention_mask[:, :, rows, :end]
            else:
                mask = _causal_tail(chunk, end, q.device)
            outs.append(self._attend(q[:, :, rows], keys[:, :, :end], values[:, :, :end], mask=mask))
        return torch.cat(outs, dim=2)


def _causal_tail(queries: int, keys: int, device) -> torch.Tensor:
    """[queries, keys] True where the last `queries` positions of `keys` may look."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
