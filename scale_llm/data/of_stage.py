"""The data of a run, as its stage wants them: documents as indexed tokens, conversations, or comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scale_llm.config.peft import PeftMethod
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import (
    DpoConfig,
    GenerateConfig,
    PreferenceLoss,
    RewardConfig,
    ScoreConfig,
    SftConfig,
    TrainOn,
)

if TYPE_CHECKING:
    from scale_llm.data.chat.examples import PreparedExamples
    from scale_llm.data.chat.preferences import PreparedPreferences
    from scale_llm.data.chat.prompts import PreparedPrompts
    from scale_llm.data.prepare import PreparedData


def prepare_run(
    cfg: RunConfig, show_progress: bool = False
) -> PreparedData | PreparedExamples | PreparedPreferences | PreparedPrompts:
    """Makes the data of a resolved run, or finds what an earlier call made."""
    assert cfg.data.cache_dir is not None, "resolved"
    longest = cfg.model.seq_length - places_taken(cfg)
    if isinstance(cfg.stage, SftConfig | ScoreConfig):
        from scale_llm.data.chat.examples import prepare_examples

        train_on = cfg.stage.train_on if isinstance(cfg.stage, SftConfig) else TrainOn.last_assistant
        return prepare_examples(
            cfg.data, cfg.tokenizer, train_on=train_on, seq_length=longest, cache_dir=cfg.data.cache_dir,
            show_progress=show_progress,
        )  # fmt: skip
    if isinstance(cfg.stage, GenerateConfig | PolicyStageConfig):
        from scale_llm.data.chat.prompts import prepare_prompts

        return prepare_prompts(
            cfg.data, cfg.tokenizer, longest=longest - cfg.stage.max_new_tokens, cache_dir=cfg.data.cache_dir,
            show_progress=show_progress,
        )  # fmt: skip
    if isinstance(cfg.stage, RewardConfig | DpoConfig):
        from scale_llm.data.chat.preferences import prepare_preferences

        unpaired = isinstance(cfg.stage, DpoConfig) and cfg.stage.loss is PreferenceLoss.kto
        return prepare_preferences(
            cfg.data, cfg.tokenizer, kind="unpaired" if unpaired else "pairs", seq_length=longest,
            cache_dir=cfg.data.cache_dir, show_progress=show_progress,
        )  # fmt: skip
    from scale_llm.data.prepare import prepare

    return prepare(cfg.data, cfg.tokenizer, cfg.data.cache_dir, show_progress)


def places_taken(cfg: RunConfig) -> int:
    """Places of every row that hold no token of the data: prompt tuning's vectors."""
    return cfg.peft.num_virtual_tokens if cfg.peft.method is PeftMethod.prompt_tuning else 0
