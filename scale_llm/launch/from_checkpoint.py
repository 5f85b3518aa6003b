"""model=from_checkpoint: the model group, and the tokenizer where none is given, are those of checkpoint.load."""

import json
import os
from dataclasses import fields
from pathlib import Path

from scale_llm.config.checkpoint_files import TOKENIZER_DIR, is_huggingface, latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.io import CONFIG_FILE, load_config
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
    written = _huggingface(load) if is_huggingface(load) else _ours(load)
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

    reference = cfg.stage.reference_load if isinstance(cfg.stage, DpoConfig) else None
    found = []
    for key, load in (("checkpoint.load", cfg.checkpoint.load), ("stage.reference_load", reference)):
        if load is None or not is_huggingface(load):
            continue
        try:
            found += differences(_huggingface(Path(load), key).model, cfg.model, Path(load), key)
        except UserError as error:
            found += error.problems
    return found


def _huggingface(directory: Path, key: str = "checkpoint.load") -> RunConfig:
    from scale_llm.models.huggingface import read_model
    from scale_llm.models.huggingface.tokenizer import tokenizer_of

    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={directory}: config.json cannot be read ({error})") from error
    return RunConfig(run_dir="", model=read_model(config, str(path)), tokenizer=tokenizer_of(directory, config))


def _ours(directory: Path) -> RunConfig:
    if not directory.is_dir():
        raise UserError(
            f"checkpoint.load={directory}: no such directory; give a run's checkpoints directory (the demo's is made "
            "by make demo), or a Hugging Face directory"
        )
    try:
        found = latest_checkpoint(directory)
    except ValueError as error:
        raise UserError(f"checkpoint.load={directory}: {error}") from error
    if found is None or not (found[1] / CONFIG_FILE).is_file():
        raise UserError(
            f"checkpoint.load={directory}: holds no {CONFIG_FILE} that says what the model is; give the model group "
            "instead of model=from_checkpoint"
        )
    cfg = load_config(found[1])
    for place in (found[1] / TOKENIZER_DIR, found[1].parent / "huggingface"):  # of a run, of an import
        if (place / "tokenizer.json").is_file():
            cfg.tokenizer.path = str(place.resolve())
            break
    return cfg
