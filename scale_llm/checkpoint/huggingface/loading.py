"""A Hugging Face model straight into a running one."""

from pathlib import Path
from typing import Any

import torch

from scale_llm.checkpoint.huggingface.source import HuggingFaceModel
from scale_llm.checkpoint.staging import refuse
from scale_llm.config.model import ModelConfig
from scale_llm.models.init import shards


def load_huggingface(directory: Path, state: dict[str, Any], model: ModelConfig) -> None:
    """Fills a sharded model state in place from a Hugging Face model; each rank reads what it holds.

    Raises:
        UserError: see HuggingFaceModel; or the running model has another shape.
    """
    source = HuggingFaceModel(directory)
    tables = {tensor.key: tensor for tensor in source.tensors}
    problems = []
    with torch.no_grad():
        for shard in shards(state):
            depth = shard.prepend_axis_num
            tensor = tables.pop(shard.key, None) or next((t for t in source.tensors if t.key == shard.key), None)
            wanted = tuple(shard.global_shape[depth:])
            if tensor is None:
                problems.append(f"{directory}: has nothing for {shard.key}; use model=from_checkpoint")
                continue
            shape = tensor.shape(source.model, wanted[0])
            if shape != wanted or tensor.leading(source.model) != tuple(shard.global_shape[:depth]):
                problems.append(
                    f"{directory}: {shard.key} would be {tensor.leading(source.model) + shape}, the model wants "
                    f"{tuple(shard.global_shape)}; use model=from_checkpoint"
                )
                continue
            whole = source.megatron(tensor, tuple(shard.global_offset[:depth]), wanted[0])
            box = tuple(
                slice(start, start + size)
                for start, size in zip(shard.global_offset[depth:], shard.local_shape, strict=True)
            )
            shard.data.copy_(whole[box].view(shard.data.shape))
    refuse(list(dict.fromkeys(problems)))
