"""How far a run has come, by its run directory. No torch."""

from pathlib import Path

from scale_llm.config.batch import total_iterations
from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.run import RunConfig
from scale_llm.launch.sweep import last_row


def iteration(cfg: RunConfig, run_dir: Path | str | None = None) -> int:
    """The last iteration that anything was written of. run_dir: where it lies now."""
    logged = last_row(str(run_dir or cfg.run_dir)).get("iteration", 0)
    return max(int(logged), saved_iteration(cfg))


def saved_iteration(cfg: RunConfig) -> int:
    """Of the last checkpoint; 0 where there is none."""
    try:
        found = latest_checkpoint(cfg.checkpoint.save or "")
    except (ValueError, OSError):
        return 0
    return 0 if found is None else found[0]


def is_done(cfg: RunConfig) -> bool:
    """Whether the last checkpoint is of the last iteration, so that a start would find nothing to do."""
    if cfg.train.train_iters is None and cfg.train.train_samples is None:
        return False  # epochs are counted where the data are
    return 0 < total_iterations(cfg.train) <= saved_iteration(cfg)
