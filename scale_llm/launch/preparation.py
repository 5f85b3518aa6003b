"""Data before ranks: tokenizer and indexed tokens are made once, and what is wrong with them is found here."""

from pathlib import Path

from scale_llm.config.errors import UserError
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import EvaluateConfig


def prepare_data(cfg: RunConfig) -> None:
    """Make or find the data of a run; raises UserError for anything wrong with them."""
    from scale_llm.data.prepare import check_splits, prepare

    assert cfg.data.cache_dir is not None, "resolved"
    prepared = prepare(cfg.data, cfg.tokenizer, Path(cfg.data.cache_dir), show_progress=cfg.logging.progress)
    problems = check_splits(prepared, cfg.data, seq_length=cfg.model.seq_length, splits=splits_used(cfg))
    if cfg.model.vocab_size is not None and prepared.vocab_size > cfg.model.vocab_size:
        problems.append(
            f"model.vocab_size={cfg.model.vocab_size}: smaller than the {prepared.vocab_size} tokens of "
            f"{prepared.tokenizer_path}; leave model.vocab_size=null to take the tokenizer's"
        )
    if problems:
        raise UserError(problems)


def splits_used(cfg: RunConfig) -> tuple[str, ...]:
    """Splits this run reads."""
    if isinstance(cfg.stage, EvaluateConfig):
        return (cfg.stage.split,)
    return ("train", "validation") if cfg.train.eval_iters > 0 else ("train",)
