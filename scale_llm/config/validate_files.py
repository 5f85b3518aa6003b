"""What is on disk: a run directory that can be written and holds no other model, a checkpoint that is there and fits."""

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scale_llm.config.errors import UserError
from scale_llm.config.io import CONFIG_FILE, load_raw
from scale_llm.config.run import RunConfig

ANY_MODEL = {"name", "backend", "hidden_dropout", "attention_dropout", "moe_aux_loss_coeff", "seq_length",
             "moe_router_load_balancing_type", "init_method_std", "make_vocab_size_divisible_by",
             "max_position_embeddings"}  # fmt: skip
"""Keys of the model that a checkpoint does not fix. A learned position table does fix its length: see _fixed."""

LATEST = "latest_checkpointed_iteration.txt"


def file_problems(cfg: RunConfig) -> list[str]:
    """Problems of run_dir and of the directories that are written or read."""
    return [*_writable("run_dir", cfg.run_dir), *_writable_elsewhere(cfg), *_same_run(cfg), *_load(cfg)]


def _writable(key: str, directory: str) -> list[str]:
    path = Path(directory)
    if path.exists() and not path.is_dir():
        return [f"{key}={directory}: is a file; give a directory"]
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return [f"{key}={directory}: {parent} is a file; give another directory"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"{key}={directory}: {parent} is not writable for this user; give another directory"]
    return []


def _writable_elsewhere(cfg: RunConfig) -> list[str]:
    """Directories outside run_dir that the run writes."""
    places = {"checkpoint.save": cfg.checkpoint.save, "data.cache_dir": cfg.data.cache_dir}
    inside = os.path.abspath(cfg.run_dir)
    outside = {
        key: path for key, path in places.items() if path and not os.path.abspath(path).startswith(inside)
    }
    return [problem for key, path in outside.items() for problem in _writable(key, path)]


def _same_run(cfg: RunConfig) -> list[str]:
    path = Path(cfg.run_dir) / CONFIG_FILE
    if not path.is_file():
        return []
    try:
        former = load_raw(path)
    except UserError as error:
        return error.problems
    stage = (former.get("stage") or {}).get("name")
    if stage != cfg.stage.name:
        return [
            f"run_dir={cfg.run_dir}: holds a run of stage {stage}, this one is {cfg.stage.name}; give another run_dir"
        ]
    return _other_model(
        cfg, former, f"run_dir={cfg.run_dir}: holds a run of another model", "give another run_dir"
    )


def _load(cfg: RunConfig) -> list[str]:
    load = cfg.checkpoint.load
    if load is None:
        return []
    path = Path(load)
    if not path.is_dir():
        return [f"checkpoint.load={load}: no such directory; give the checkpoints directory of a run"]
    if not (path / LATEST).is_file():
        hint = (
            f"; give checkpoint.load={path / 'checkpoints'}"
            if (path / "checkpoints" / LATEST).is_file()
            else ""
        )
        return [
            f"checkpoint.load={load}: holds no {LATEST}{hint or '; give the checkpoints directory of a run'}"
        ]
    config = path.parent / CONFIG_FILE
    if not config.is_file():
        return []  # written elsewhere (Megatron-LM): its shapes are compared when it is read
    try:
        former = load_raw(config)
    except UserError:
        return []
    return _other_model(
        cfg, former, f"checkpoint.load={load}: holds another model", "choose the model it was trained with"
    )


def _other_model(cfg: RunConfig, former: dict[str, Any], what: str, remedy: str) -> list[str]:
    before = former.get("model") or {}
    now: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(cfg.model), enum_to_str=True)  # type: ignore[assignment]
    different = [
        f"model.{key}={now[key]} (there {before[key]})"
        for key in now
        if key in before and key not in _free(now) and before[key] != now[key]
    ]
    return [f"{what}: {', '.join(different)}; {remedy}"] if different else []


def _free(model: dict[str, Any]) -> set[str]:
    return (
        ANY_MODEL - {"max_position_embeddings"}
        if model["position_embedding_type"] == "learned_absolute"
        else ANY_MODEL
    )
