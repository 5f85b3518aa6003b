"""Which job a run does."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Common base; each stage has its own dataclass with its own keys."""

    name: str = "pretrain"


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    """Next-token prediction on documents."""

    name: str = "pretrain"


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(StageConfig):
    """Loss, perplexity and bits per byte of a checkpoint."""

    name: str = "evaluate"
    split: str = "test"
    """train, validation or test."""
