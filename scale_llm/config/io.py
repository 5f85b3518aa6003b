"""config.yaml of a run directory: written whole or not at all, read back exactly as it was."""

import functools
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from scale_llm.config.errors import UserError
from scale_llm.config.run import RunConfig
from scale_llm.config.store import STAGES

CONFIG_FILE = "config.yaml"


def to_yaml(cfg: RunConfig) -> str:
    """The whole configuration as YAML, enums by name."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_config(cfg: RunConfig, run_dir: Path) -> Path | None:
    """Write run_dir/config.yaml. A different one that was there is kept as config.<n>.yaml, whose path is returned."""
    path, text = run_dir / CONFIG_FILE, to_yaml(cfg)
    kept = None
    if path.exists():
        former = path.read_text(encoding="utf-8")
        if former == text:
            return None
        kept = _next_free(run_dir)
        write_text(kept, former)
    write_text(path, text)
    return kept


def _next_free(run_dir: Path) -> Path:
    number = 1
    while (run_dir / f"config.{number}.yaml").exists():
        number += 1
    return run_dir / f"config.{number}.yaml"


def load_raw(path: Path) -> dict[str, Any]:
    """A config file as plain dictionaries, without checking its keys (it may be of another version)."""
    try:
        raw = OmegaConf.load(path)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a readable configuration ({error}); move it away or repair it") from error
    if not isinstance(raw, DictConfig):
        raise UserError(f"{path}: not a configuration of scale_llm; move it away or repair it")
    return OmegaConf.to_container(raw)  # type: ignore[return-value]


@functools.cache
def run_schema(stage: Any) -> DictConfig:
    """Keys, types and defaults of a run with this class of stage; to be merged into, which copies it."""
    return OmegaConf.structured(RunConfig(run_dir="", stage=stage()))


def load_config(path: Path | str) -> RunConfig:
    """The RunConfig that save_config wrote; `path` is the file or its run directory."""
    path = Path(path)
    path = path / CONFIG_FILE if path.is_dir() else path
    raw = load_raw(path)
    try:
        stage: Any = STAGES[raw["stage"]["name"]]
        cfg = OmegaConf.to_object(OmegaConf.merge(run_schema(stage), raw))
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: does not fit this version of scale_llm ({error}); compose the run anew") from error
    assert isinstance(cfg, RunConfig)
    return cfg
