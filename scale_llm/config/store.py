"""Hydra's view of the dataclasses: schemas in the hidden group `schema`, the options a user sees in conf/.

A file conf/<group>/<option>.yaml begins with `defaults: [/schema/<group>@_here_]` (for stages, which differ in
their keys, `/schema/stage/<name>@_here_`), so defaults live in the dataclasses alone and the YAML says what differs.
Schemas hold types and no values: what a composed tree holds, a file or a word has set; `compose` adds the defaults.
"""

import dataclasses
import functools
import importlib.util
import typing
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from scale_llm.config.checkpoint import CheckpointConfig
from scale_llm.config.cluster import ClusterConfig
from scale_llm.config.curate import CurateConfig, CurationConfig
from scale_llm.config.data import DataConfig
from scale_llm.config.health import HealthConfig
from scale_llm.config.layout import LayoutConfig
from scale_llm.config.logging import LoggingConfig
from scale_llm.config.model import ModelConfig
from scale_llm.config.optim import OptimConfig
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.peft import PeftConfig
from scale_llm.config.policy import GrpoConfig, PpoConfig
from scale_llm.config.precision import PrecisionConfig
from scale_llm.config.profile import ProfileConfig
from scale_llm.config.reward import RewardFunctionConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import (
    DpoConfig,
    EvaluateConfig,
    GenerateConfig,
    PretrainConfig,
    RewardConfig,
    ScoreConfig,
    SftConfig,
    StageConfig,
)
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.config.train import TrainConfig

STAGES: dict[str, type[StageConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "ppo": PpoConfig,
    "grpo": GrpoConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
    "generate": GenerateConfig,
}

SCHEMAS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "train": TrainConfig,
    "parallel": ParallelConfig,
    "layout": LayoutConfig,
    "precision": PrecisionConfig,
    "peft": PeftConfig,
    "optim": OptimConfig,
    "reward": RewardFunctionConfig,
    "checkpoint": CheckpointConfig,
    "health": HealthConfig,
    "logging": LoggingConfig,
    "profile": ProfileConfig,
    "cluster": ClusterConfig,
}

GROUPS = ["stage", *SCHEMAS, "experiment"]
"""The groups a user chooses from, in the order of the help text."""


@functools.cache
def register() -> None:
    """Put every schema into Hydra's store; calling it again changes nothing."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    groups: dict[str, Any] = {name: _open(schema) for name, schema in SCHEMAS.items()}
    # The stage is left out: one stage's dataclass would refuse the keys of every other
    store.store(group="schema", name="run", node=RunConfig(run_dir=MISSING, stage=MISSING, **groups))
    for name, node in groups.items():
        store.store(group="schema", name=name, node=node)
    curate = _open(CurateConfig)
    store.store(group="schema", name="curate", node=curate)
    store.store(
        group="schema", name="curation",
        node=CurationConfig(
            input=MISSING, output=MISSING, tasks=MISSING, on_bad_row=MISSING, curate=curate, cluster=groups["cluster"]
        ),
    )  # fmt: skip
    for name, schema in STAGES.items():
        store.store(group="schema/stage", name=name, node=_open(schema, name=name))


def _open(schema: type, **values: Any) -> Any:
    """The dataclass with no value in any field but these."""
    for name, kind in typing.get_type_hints(schema).items():
        nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        values.setdefault(name, _open(kind) if nested else MISSING)
    return schema(**values)


def conf_dir() -> Path:
    """conf/ of the checkout, or scale_llm_conf where a wheel put it."""
    checkout = Path(__file__).resolve().parents[2] / "conf"
    if (checkout / "config.yaml").is_file():
        return checkout
    spec = importlib.util.find_spec("scale_llm_conf")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the package scale_llm_conf (conf/ of the repository) is not installed")
    return Path(list(spec.submodule_search_locations)[0])


def options(group: str) -> list[str]:
    """Names a user may give for a group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
