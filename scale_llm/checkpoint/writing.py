"""What lies beside the tensors of a checkpoint that no run has written."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from scale_llm import __version__
from scale_llm.config.checkpoint_files import (
    CHECKPOINT_VERSION,
    SPECIAL_IDS,
    SPECIAL_IDS_FILE,
    TOKENIZER_DIR,
    TOKENIZER_FILES,
)
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


def write_tokenizer(file: Path, checkpoint: Path, chat_template: str | None) -> None:
    """The tokenizer that a run has read, into its checkpoint.

    file: its tokenizer.json; what lies beside one of another name need not be its own. chat_template: that the run's
    conversations were written with.
    """
    kept = checkpoint / TOKENIZER_DIR
    kept.mkdir()
    if file.name == "tokenizer.json":
        for name in TOKENIZER_FILES:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, kept / name)
        if found := special_ids([file.parent]):
            (kept / SPECIAL_IDS_FILE).write_text(json.dumps(found) + "\n", encoding="utf-8")
    elif file.is_file():
        shutil.copyfile(file, kept / "tokenizer.json")
    if chat_template is not None:
        (kept / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def special_ids(places: list[Path]) -> dict[str, Any]:
    """bos, eos and pad by the first directory that says: config.json of a model, or what a checkpoint has of one. A
    config.json that cannot be read, or is another program's, says nothing: a save may not fail for it."""
    for place in places:
        for name in ("config.json", SPECIAL_IDS_FILE):
            with suppress(OSError, ValueError):
                found = json.loads((place / name).read_text(encoding="utf-8"))
                if isinstance(found, dict):
                    return {key: found[key] for key in SPECIAL_IDS if found.get(key) is not None}
    return {}


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
