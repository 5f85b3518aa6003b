"""Which checkpoints a directory holds."""

import os
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"

TOKENIZER_DIR = "tokenizer"
"""Below a checkpoint: its tokenizer.json and what belongs to it."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""What lies beside the weights of a Hugging Face model and travels with them."""


def iteration_dir(directory: Path | str, iteration: int) -> Path:
    """`iter_0000100` below the directory."""
    return Path(directory) / f"iter_{iteration:07d}"


def latest_checkpoint(directory: Path | str) -> tuple[int, Path] | None:
    """(iteration, path) of the checkpoint that the tracker names; None where there is none.

    The directory may also be one checkpoint itself, `.../iter_0000100`, or a Hugging Face model.

    Raises:
        ValueError: the tracker holds something else than an iteration or `release`.
    """
    directory = Path(directory)
    if is_huggingface(directory):
        return 0, directory
    if directory.name.startswith("iter_") and (directory / "metadata.json").is_file():
        return int(directory.name[5:]), directory
    try:
        text = (directory / TRACKER).read_text().strip()
    except FileNotFoundError:
        return None
    if text == "release":
        return 0, directory / "release"
    if not text.isdigit():
        raise ValueError(f"{directory / TRACKER} holds {text!r} where an iteration should be")
    return int(text), iteration_dir(directory, int(text))


def is_huggingface(directory: Path | str) -> bool:
    """Whether a directory is a Hugging Face model: it holds a config.json and no tracker."""
    directory = Path(directory)
    return (directory / "config.json").is_file() and not (directory / TRACKER).is_file()


def write_latest(directory: Path | str, iteration: int) -> None:
    """Names the newest checkpoint; atomic, and written last."""
    tracker = Path(directory) / TRACKER
    temporary = tracker.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, tracker)
