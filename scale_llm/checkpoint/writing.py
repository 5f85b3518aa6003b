"""What lies beside the tensors of a checkpoint that no run has written."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from scale_llm import __version__
from scale_llm.config.checkpoint_files import CHECKPOINT_VERSION, TOKENIZER_DIR
from scale_llm.config.model import ModelConfig


def write_common(checkpoint: Path, origin: str) -> None:
    """common.pt and metadata.json, as megatron-core reads them. origin: what the checkpoint was made of."""
    common = {
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "written_by": f"scale_llm {__version__}, {origin}",
    }
    torch.save(common, checkpoint / "common.pt")
    (checkpoint / "metadata.json").write_text(json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1,
    }))  # fmt: skip


def copy_tokenizer(source: Path, checkpoint: Path) -> None:
    """The tokenizer of one checkpoint into another."""
    if (source / TOKENIZER_DIR).is_dir():
        shutil.copytree(source / TOKENIZER_DIR, checkpoint / TOKENIZER_DIR)


def extra_states(model: ModelConfig) -> dict[str, Any]:
    """megatron-core's linear layers look for an (empty) extra state under these names."""
    names = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    layers = range(model.num_layers)
    found = {}
    if model.num_experts is None:
        names += ["mlp.linear_fc1", "mlp.linear_fc2"]
    else:
        for name in ("linear_fc1", "linear_fc2"):
            for layer in layers:
                for expert in range(model.num_experts):
                    place = f"shard_{layer}.{expert}_{model.num_layers}.{model.num_experts}"
                    found[f"decoder.layers.mlp.experts.experts.{name}._extra_state/{place}"] = [None]
    for name in names:
        for layer in layers:
            found[f"decoder.layers.{name}._extra_state/shard_{layer}_{model.num_layers}"] = [None]
    return found
