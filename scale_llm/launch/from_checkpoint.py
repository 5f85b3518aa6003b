"""model=from_checkpoint: the model group, and the tokenizer where none is given, are those of checkpoint.load."""

import os
from dataclasses import fields
from pathlib import Path

from scale_llm.checkpoint.written import written_config
from scale_llm.config.checkpoint_files import is_huggingface
from scale_llm.config.errors import UserError
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import DpoConfig, EvaluateConfig, PretrainConfig, UntrainedStageConfig

NAME = "from_checkpoint"


def take_model(cfg: RunConfig, unset: set[str]) -> None:
    """Fills cfg.model and cfg.tokenizer in place. unset: keys that neither a word nor a file has set; the others stay.

    Raises:
        UserError: checkpoint.load is not given, or does not say what its model is.
    """
    if cfg.checkpoint.load is None:
        raise UserError(f"model={NAME}: give checkpoint.load=DIR, whose model it means")
    load = Path(os.path.expanduser(cfg.checkpoint.load))
    written = written_config(load)
    if isinstance(cfg.stage, UntrainedStageConfig):
        cfg.peft = written.peft  # what is evaluated is the model with its adapters
    for name in (field.name for field in fields(cfg.model)):
        if name == "name" or f"model.{name}" in unset:
            setattr(cfg.model, name, getattr(written.model, name))
    if cfg.tokenizer.path is None and written.tokenizer.path is not None:
        chat = () if isinstance(cfg.stage, PretrainConfig | EvaluateConfig) else ("chat_template",)
        for name in ("path", "eod_token", *chat):
            if f"tokenizer.{name}" in unset:
                setattr(cfg.tokenizer, name, getattr(written.tokenizer, name))


def huggingface_problems(cfg: RunConfig) -> list[str]:
    """Hugging Face directories in checkpoint.load and stage.reference_load whose models are not the run's."""
    from scale_llm.models.huggingface.same_function import differences

    reference = cfg.stage.reference_load if isinstance(cfg.stage, DpoConfig | PolicyStageConfig) else None
    found = []
    for key, load in (("checkpoint.load", cfg.checkpoint.load), ("stage.reference_load", reference)):
        if load is None or not is_huggingface(load):
            continue
        try:
            found += differences(written_config(load, key).model, cfg.model, Path(load), key)
        except UserError as error:
            found += error.problems
    return found
