"""What a checkpoint says of its model and tokenizer. Imports no torch for our own checkpoints."""

import json
from pathlib import Path

from scale_llm.config.checkpoint_files import TOKENIZER_DIR, is_huggingface, latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.io import CONFIG_FILE, load_config
from scale_llm.config.run import RunConfig


def written_config(directory: Path | str | None, key: str = "checkpoint.load") -> RunConfig:
    """Model and tokenizer of a run's checkpoints, of one of them, or of a Hugging Face directory.

    key: of the configuration, for messages.

    Raises:
        UserError: it does not say.
    """
    if directory is None:
        raise UserError(f"{key}=null: give a run's checkpoints directory, or a Hugging Face directory")
    directory = Path(directory)
    return _huggingface(directory, key) if is_huggingface(directory) else _ours(directory, key)


def _huggingface(directory: Path, key: str) -> RunConfig:
    from scale_llm.models.huggingface import read_model
    from scale_llm.models.huggingface.tokenizer import tokenizer_of

    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={directory}: config.json cannot be read ({error})") from error
    return RunConfig(run_dir="", model=read_model(config, str(path)), tokenizer=tokenizer_of(directory, config))


def _ours(directory: Path, key: str) -> RunConfig:
    if not directory.is_dir():
        raise UserError(
            f"{key}={directory}: no such directory; give a run's checkpoints directory (the demo's is made "
            "by make demo), or a Hugging Face directory"
        )
    try:
        found = latest_checkpoint(directory)
    except ValueError as error:
        raise UserError(f"{key}={directory}: {error}") from error
    if found is None or not (found[1] / CONFIG_FILE).is_file():
        remedy = "give the model group instead of model=from_checkpoint" if key == "checkpoint.load" else "give another"
        raise UserError(f"{key}={directory}: holds no {CONFIG_FILE} that says what the model is; {remedy}")
    cfg = load_config(found[1])
    for place in (found[1] / TOKENIZER_DIR, found[1].parent / "huggingface"):  # of a run, of an import
        if (place / "tokenizer.json").is_file():
            cfg.tokenizer.path = str(place.resolve())
            break
    return cfg
