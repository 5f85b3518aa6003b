"""What lies under a checkpoint of adapters. Imports no torch."""

from pathlib import Path

from scale_llm.config.checkpoint_files import is_huggingface, latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.io import CONFIG_FILE, load_raw


def base_of(path: Path) -> Path | None:
    """The whole model that the adapters in a checkpoint belong to; None where it holds a whole model itself.

    A run with adapters that began from adapters went on from those: its own hold them, and lie over what they lay over.

    path: one checkpoint, `.../iter_0000100`, or a Hugging Face directory.

    Raises:
        UserError: its configuration does not say, or what it says is not there.
    """
    base, passed = _beneath(path), [path.resolve()]
    while base is not None and (deeper := _beneath(base)) is not None:
        passed.append(base.resolve())
        if deeper.resolve() in passed:
            raise UserError(f"{path}: its adapters belong to themselves ({deeper}); write where their base is into "
                            f"{base / CONFIG_FILE} (checkpoint.load)")  # fmt: skip
        base = deeper
    return base


def _beneath(path: Path) -> Path | None:
    """What the run of a checkpoint of adapters began from; None for a whole model."""
    if is_huggingface(path) or not (path / CONFIG_FILE).is_file():
        return None
    written = load_raw(path / CONFIG_FILE)
    if (written.get("peft") or {}).get("method", "none") == "none":
        return None
    base = (written.get("checkpoint") or {}).get("load")
    if base is None:
        raise UserError(f"{path}: its {CONFIG_FILE} does not say what its adapters belong to (checkpoint.load)")
    remedy = f"put it back, or write where it is into {path / CONFIG_FILE} (checkpoint.load)"
    try:
        found = latest_checkpoint(base)
    except ValueError as error:
        raise UserError(f"{path}: holds adapters of {base}: {error}; {remedy}") from error
    if found is None or not found[1].is_dir():
        raise UserError(f"{path}: needs its base {base}, where no checkpoint is; {remedy}")
    return found[1]
