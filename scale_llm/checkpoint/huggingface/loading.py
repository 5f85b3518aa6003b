"""A Hugging Face model straight into a running one."""

from pathlib import Path
from typing import Any

import torch

from scale_llm.checkpoint.huggingface.source import HuggingFaceModel
from scale_llm.checkpoint.staging import refuse
from scale_llm.config.model import ModelConfig
from scale_llm.models.heads import HEAD
from scale_llm.models.huggingface.same_function import differences
from scale_llm.models.init import shards


def load_huggingface(directory: Path, state: dict[str, Any], model: ModelConfig) -> None:
    """Fills a sharded model state in place from a Hugging Face model; each rank reads what it holds.

    Raises:
        UserError: see HuggingFaceModel; or the running model is another function of these weights. On every rank.
    """
    source = HuggingFaceModel(directory)
    refuse(differences(source.model, model, source.directory, "checkpoint.load"))
    tables = {tensor.key: tensor for tensor in source.tensors}
    with torch.no_grad():
        for shard in shards(state):
            if shard.key not in tables and shard.key.startswith(HEAD):
                continue  # of a language model: the head is new
            depth = shard.prepend_axis_num
            index = tuple(shard.global_offset[:depth])
            whole = source.megatron(tables[shard.key], index, shard.global_shape[depth])
            box = tuple(
                slice(start, start + size)
                for start, size in zip(shard.global_offset[depth:], shard.local_shape, strict=True)
            )
            shard.data.copy_(whole[box].view(shard.data.shape))
