"""Which checkpoint of a directory a run begins from: settled at its first start, and the same at all others.

A directory's tracker moves on. What adapters lie on, and what a policy is measured or judged by, may not: so
config.yaml, there and in every checkpoint, names one checkpoint by its absolute path. Reads the disk.
"""

import os
from pathlib import Path
from typing import Any

from scale_llm.config.checkpoint_files import TRACKER, is_huggingface, is_iteration_name, latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.io import CONFIG_FILE, load_raw
from scale_llm.config.peft import PeftMethod
from scale_llm.config.policy import AdvEstimator, PolicyStageConfig, PpoConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import REFERENCE_FREE, DpoConfig, ReferenceModel, UntrainedStageConfig

KEYS = ("checkpoint.load", "stage.reference_load", "stage.critic_load", "reward.load")


def pin(cfg: RunConfig) -> None:
    """In place: directories of checkpoints become the checkpoints that this run begins from, those of its former starts
    where they were of the same directories. What trains nothing takes the newest at every start.

    Raises:
        UserError: see pin_problems.
    """
    if found := pin_problems(cfg):
        raise UserError(found)
    former, pinned = _of_same_stage(cfg), dict[str, str]()
    for key in KEYS:
        given = _value(cfg, key)
        if given is not None:
            if given not in pinned:  # two keys that say the same mean one checkpoint
                pinned[given] = _pinned(given, [_value(former, name) for name in (key, *KEYS)])
            group, name = key.split(".")
            setattr(getattr(cfg, group), name, pinned[given])


def pin_problems(cfg: RunConfig) -> list[str]:
    """What a run that goes on reads again, and is another now or not there any more."""
    former, found = _of_same_stage(cfg), dict[str, str]()
    if not former:
        return []
    config = Path(cfg.run_dir) / CONFIG_FILE
    for what, keys in _read_again(cfg).items():
        key, given = _first(cfg, keys)
        _, before = _first(former, keys)
        text = f"{key}={given or 'null'}: the run in {cfg.run_dir} has {what} from {before or 'no checkpoint'}"
        if (given is None) is not (before is None) or (given and before and not _same_place(before, given)):
            give = f"give {key}={before}" if before else f"leave {key} out"
            found[key] = f"{text}; {give}, or another run_dir (where it was moved, write its new place into {config})"
        elif before is not None and _one(before) is None:
            found[key] = f"{text}, which is not there any more; put it back, or give another run_dir"
    return list(found.values())


def former_run(cfg: RunConfig) -> dict[str, Any]:
    """The configuration of the run in run_dir that has got to a step; empty where there is none.

    Raises:
        UserError: it cannot be read.
    """
    run_dir = Path(cfg.run_dir)
    started = (run_dir / "metrics.jsonl").is_file() or (Path(cfg.checkpoint.save or "") / TRACKER).is_file()
    return load_raw(run_dir / CONFIG_FILE) if started and (run_dir / CONFIG_FILE).is_file() else {}


def _of_same_stage(cfg: RunConfig) -> dict[str, Any]:
    if isinstance(cfg.stage, UntrainedStageConfig):
        return {}
    former = former_run(cfg)
    return former if _value(former, "stage.name") == cfg.stage.name else {}


def _read_again(cfg: RunConfig) -> dict[str, tuple[str, ...]]:
    """What every start of the run reads -> the keys that say where, the first that is given."""
    stage, found = cfg.stage, dict[str, tuple[str, ...]]()
    if cfg.peft.method is not PeftMethod.none:
        found["what its adapters lie on"] = ("checkpoint.load",)
    if isinstance(stage, DpoConfig):
        measured = stage.loss not in REFERENCE_FREE and stage.reference is not ReferenceModel.base
    else:
        measured = isinstance(stage, PolicyStageConfig) and stage.needs_reference
    if measured:
        found["its reference"] = ("stage.reference_load", "checkpoint.load")
    if isinstance(stage, PolicyStageConfig):
        found["its reward model"] = ("reward.load",)
        if isinstance(stage, PpoConfig) and stage.adv_estimator is AdvEstimator.gae:
            found["its critic"] = ("stage.critic_load", "reward.load", "checkpoint.load")
    return found


def _pinned(given: str, former: list[str | None]) -> str:
    """The first of the former ones that is of the same place and still there, else the newest."""
    kept = (_one(one) for one in former if one is not None and _same_place(one, given))
    return next((one for one in kept if one is not None), None) or _one(given) or given  # what is not there was said


def _one(directory: str) -> str | None:
    """The absolute path of the checkpoint that a directory means; None where there is none."""
    try:
        found = latest_checkpoint(directory)
    except ValueError:
        return None
    return os.path.abspath(found[1]) if found is not None and found[1].is_dir() else None


def _same_place(former: str, given: str) -> bool:
    """Whether `former` is what is given, or one of the checkpoints in it."""
    before, now = os.path.realpath(former), os.path.realpath(given)
    inside = is_iteration_name(os.path.basename(before)) and not is_huggingface(before)
    return before == now or (inside and os.path.dirname(before) == now)


def _first(source: Any, keys: tuple[str, ...]) -> tuple[str, str | None]:
    """The first key that has a value, and the value; the first key where none has."""
    given = [(key, value) for key in keys if (value := _value(source, key)) is not None]
    return given[0] if given else (keys[0], None)


def _value(source: Any, key: str) -> Any:
    """Of a configuration, or of one as plain dictionaries; None where it has no such key."""
    for name in key.split("."):
        source = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
    return source
