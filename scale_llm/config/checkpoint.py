"""What is saved, when, and what a run starts from. Field names are Megatron's."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    save: str | None = None
    """Directory of checkpoints; None: <run_dir>/checkpoints."""
    load: str | None = None
    """Checkpoint directory to start from when the run has none of its own yet."""
    save_interval: int | None = None
    """Iterations between saves; None: only at the end."""
    finetune: bool = False
    """With load: take the weights alone and start at iteration 0."""
    no_load_optim: bool = False
    no_load_rng: bool = False
    async_save: bool = False
    """Write in the background while training goes on."""
