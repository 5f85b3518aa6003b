"""The forms of the tables as functions on tensors: Hugging Face's parts -> one Megatron tensor, and back. Exact."""

from collections.abc import Sequence

import torch

from scale_llm.config.model import ModelConfig
from scale_llm.models.huggingface.table import Form, Tensor

STACKED = (Form.vocabulary, Form.gate_up)
"""Forms that are the rows of their parts, one above the other, then zeros."""


def to_megatron(tensor: Tensor, parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """The Megatron tensor at one index, for the forms that are not STACKED."""
    form, first = tensor.form, parts[0]
    if form is Form.same:
        return first
    if form is Form.transposed:
        return first.t().contiguous()
    if form is Form.qkv_thirds:
        parts = (first.t() if first.dim() == 2 else first).chunk(3)
    groups, rest = _groups(model), parts[0].shape[1:]
    d = model.kv_channels or 0
    by_group = [part.reshape(groups, -1, d, *rest) for part in parts]  # [g, heads of a group, d, ...]
    return torch.cat(by_group, dim=1).reshape(-1, *rest)


def to_huggingface(tensor: Tensor, value: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """The parts of a Megatron tensor at one index, padding cut off."""
    form = tensor.form
    if form is Form.same:
        return [value]
    if form is Form.vocabulary:
        return [value[: tensor.parts[0].sizes(model)[0]]]
    if form is Form.gate_up:
        return list(value.chunk(2))
    if form is Form.transposed:
        return [value.t()]
    groups, rest, d = _groups(model), value.shape[1:], model.kv_channels or 0
    heads = model.num_attention_heads // groups
    by_group = value.reshape(groups, heads + 2, d, *rest)
    parts = [part.reshape(-1, *rest) for part in by_group.split([heads, 1, 1], dim=1)]
    if form is Form.qkv_thirds:
        joined = torch.cat(parts)
        return [joined.t() if joined.dim() == 2 else joined]
    return parts


def _groups(model: ModelConfig) -> int:
    return model.num_query_groups or model.num_attention_heads
