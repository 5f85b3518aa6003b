"""The data of a run, as its stage wants them: documents as indexed tokens, or conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scale_llm.config.peft import PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import SftConfig

if TYPE_CHECKING:
    from scale_llm.data.chat.examples import PreparedExamples
    from scale_llm.data.prepare import PreparedData


def prepare_run(cfg: RunConfig, show_progress: bool = False) -> PreparedData | PreparedExamples:
    """Makes the data of a resolved run, or finds what an earlier call made. See `prepare` and `prepare_examples`."""
    assert cfg.data.cache_dir is not None, "resolved"
    if not isinstance(cfg.stage, SftConfig):
        from scale_llm.data.prepare import prepare

        return prepare(cfg.data, cfg.tokenizer, cfg.data.cache_dir, show_progress)
    from scale_llm.data.chat.examples import prepare_examples

    return prepare_examples(
        cfg.data,
        cfg.tokenizer,
        train_on=cfg.stage.train_on,
        seq_length=cfg.model.seq_length - places_taken(cfg),
        cache_dir=cfg.data.cache_dir,
        show_progress=show_progress,
    )


def places_taken(cfg: RunConfig) -> int:
    """Places of every row that hold no token of the data: prompt tuning's vectors."""
    return cfg.peft.num_virtual_tokens if cfg.peft.method is PeftMethod.prompt_tuning else 0
