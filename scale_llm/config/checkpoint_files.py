"""Which checkpoints a directory holds."""

import os
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"

CHECKPOINT_VERSION = 3.0
"""Megatron-LM's number for the layout of names that we write; a higher one is of code that is newer than this."""

TOKENIZER_DIR = "tokenizer"
"""Below a checkpoint: its tokenizer.json and what belongs to it."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""What lies beside the weights of a Hugging Face model and travels with them."""

SPECIAL_IDS_FILE = "special_token_ids.json"
"""Among them: what config.json of the model that a run began from, which does not travel, says of these."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


INSIDE = ("metadata.json", "common.pt", ".metadata")
"""What the directory of one checkpoint holds; a damaged one lacks some."""


def is_iteration_name(name: str) -> bool:
    """Whether a directory of this name may be one checkpoint: `iter_0000100`, or Megatron-LM's `release`."""
    return name == "release" or (name.startswith("iter_") and name[5:].isdecimal())


def iteration_dir(directory: Path | str, iteration: int) -> Path:
    """`iter_0000100` below the directory."""
    return Path(directory) / f"iter_{iteration:07d}"


def latest_checkpoint(directory: Path | str) -> tuple[int, Path] | None:
    """(iteration, path) of the checkpoint that the tracker names; None where there is none.

    The directory may also be one checkpoint itself, `.../iter_0000100` or `.../release`, or a Hugging Face model.

    Raises:
        ValueError: the tracker holds something else than an iteration or `release`.
    """
    directory = Path(directory)
    if is_huggingface(directory):
        return 0, directory
    if is_iteration_name(directory.name) and any((directory / name).is_file() for name in INSIDE):
        return int(directory.name.removeprefix("iter_").replace("release", "0")), directory
    try:
        text = (directory / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    if text == "release":
        return 0, directory / "release"
    if not text.isdecimal():
        raise ValueError(f"{directory / TRACKER} holds {text!r} where an iteration should be")
    return int(text), iteration_dir(directory, int(text))


def saved_iterations(directory: Path | str) -> list[int]:
    """Iterations whose directories are there, whole or not, newest first."""
    directory = Path(directory)
    found = [path.name[5:] for path in directory.glob("iter_*") if path.is_dir()]
    return sorted((int(n) for n in found if n.isdecimal() and iteration_dir(directory, int(n)).is_dir()), reverse=True)


def resumable(directory: Path | str) -> tuple[list[tuple[int, Path]], str | None]:
    """Checkpoints that a run may go on from, best first, and what is wrong with the tracker.

    They are the one that the tracker names and older ones: what is newer was left behind on purpose. Where the tracker
    does not say, they are all that are there.
    """
    directory, wrong = Path(directory), None
    there = [(iteration, iteration_dir(directory, iteration)) for iteration in saved_iterations(directory)]
    try:
        found = latest_checkpoint(directory)
        if found is not None and found[1].is_dir():
            return [found, *(one for one in there if one[0] < found[0])], None
        if found is not None:
            wrong = f"{directory / TRACKER} names {found[1].name}, which is not there"
        elif there:
            wrong = f"{directory / TRACKER} is not there"
    except ValueError as error:
        wrong = str(error)
    return there, wrong


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
