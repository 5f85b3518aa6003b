"""Whether a run's model group is the function that a Hugging Face model is. No torch: asked before ranks start."""

from dataclasses import fields
from enum import Enum
from pathlib import Path

from scale_llm.config.model import Head, ModelConfig, PositionEmbedding, RopeScaling

FREE = {
    "name", "architecture", "backend", "compile_ops", "seq_length", "make_vocab_size_divisible_by", "hidden_dropout",
    "attention_dropout", "init_method_std", "moe_aux_loss_coeff", "moe_router_load_balancing_type",
}  # fmt: skip
"""Fields of the model that do not change what its weights compute."""


def differences(source: ModelConfig, model: ModelConfig, directory: Path, key: str) -> list[str]:
    """Problems of a running model that is not the one (`source`) that the config.json of a directory describes.

    key: what names the directory; checkpoint.load is where the model comes from, other keys must fit it.
    """
    free = set(FREE)
    if model.position_embedding_type is not PositionEmbedding.learned_absolute:
        free |= {"max_position_embeddings"}
    if model.rope_scaling is RopeScaling.none is source.rope_scaling:
        free |= {field.name for field in fields(model) if field.name.startswith("rope_")}
    if model.num_experts is None:
        free |= {field.name for field in fields(model) if field.name.startswith("moe_")}
    if model.head is not Head.language_model and source.head is Head.language_model:
        free |= {"head", "untie_embeddings_and_output_weights"}  # a head that is new
    problems = []
    for field in fields(model):
        ours, theirs = getattr(model, field.name), getattr(source, field.name)
        if field.name in free or ours == theirs:
            continue
        ours, theirs = (value.value if isinstance(value, Enum) else value for value in (ours, theirs))
        remedy = f"give model=from_checkpoint, or model.{field.name}={theirs}"
        if key != "checkpoint.load":
            remedy = f"give a {key} of the same model"
        problems.append(f"model.{field.name}={ours}: {key}={directory} has {theirs}; {remedy}")
    return problems
