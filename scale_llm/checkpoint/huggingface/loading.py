"""A Hugging Face model straight into a running one."""

from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from scale_llm.checkpoint.huggingface.source import HuggingFaceModel
from scale_llm.checkpoint.staging import refuse
from scale_llm.config.model import ModelConfig, PositionEmbedding, RopeScaling
from scale_llm.models.init import shards


def load_huggingface(directory: Path, state: dict[str, Any], model: ModelConfig) -> None:
    """Fills a sharded model state in place from a Hugging Face model; each rank reads what it holds.

    Raises:
        UserError: see HuggingFaceModel; or the running model is another function of these weights. On every rank.
    """
    source = HuggingFaceModel(directory)
    refuse(_differences(source, model))
    tables = {tensor.key: tensor for tensor in source.tensors}
    with torch.no_grad():
        for shard in shards(state):
            depth = shard.prepend_axis_num
            index = tuple(shard.global_offset[:depth])
            whole = source.megatron(tables[shard.key], index, shard.global_shape[depth])
            box = tuple(
                slice(start, start + size)
                for start, size in zip(shard.global_offset[depth:], shard.local_shape, strict=True)
            )
            shard.data.copy_(whole[box].view(shard.data.shape))


FREE = {
    "name", "architecture", "backend", "compile_ops", "seq_length", "make_vocab_size_divisible_by", "hidden_dropout",
    "attention_dropout", "init_method_std", "moe_aux_loss_coeff", "moe_router_load_balancing_type",
}  # fmt: skip
"""Fields of the model that do not change what its weights compute."""


def _differences(source: HuggingFaceModel, model: ModelConfig) -> list[str]:
    """Fields in which the running model is not the one that config.json describes."""
    free = set(FREE)
    if model.position_embedding_type is not PositionEmbedding.learned_absolute:
        free |= {"max_position_embeddings"}
    if model.rope_scaling is RopeScaling.none is source.model.rope_scaling:
        free |= {field.name for field in fields(model) if field.name.startswith("rope_")}
    if model.num_experts is None:
        free |= {field.name for field in fields(model) if field.name.startswith("moe_")}
    problems = []
    for field in fields(model):
        ours, theirs = getattr(model, field.name), getattr(source.model, field.name)
        if field.name in free or ours == theirs:
            continue
        ours, theirs = (value.value if isinstance(value, Enum) else value for value in (ours, theirs))
        problems.append(
            f"model.{field.name}={ours}: checkpoint.load={source.directory} has {theirs}; give model=from_checkpoint, "
            f"or model.{field.name}={theirs}"
        )
    return problems
