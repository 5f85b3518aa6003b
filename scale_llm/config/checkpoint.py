"""What is saved, when, and what a run starts from. Field names are Megatron's."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    save: str | None = None
    """Directory of checkpoints; None: <run_dir>/checkpoints."""
    load: str | None = None
    """Checkpoint directory to start from when the run has none of its own yet. Its newest at the run's first start is
    what the run keeps to (`config.pins`); so for reward.load, stage.reference_load and stage.critic_load."""
    save_interval: int | None = None
    """Iterations between saves; None: only at the end."""
    finetune: bool = False
    """With load: take the weights alone and start at iteration 0."""
    no_load_optim: bool = False
    no_load_rng: bool = False
    async_save: bool = False
    """Write in the background while training goes on."""
    verify: bool = True
    """Compare every file of a checkpoint with its checksum before any of it is loaded; false: only its length."""
    keep_last: int | None = None
    """Checkpoints that stay, the newest; older ones are removed when a new one is there. None: all. With 2 or more a
    damaged one can be passed over. Name no checkpoint of a run that removes them in another run's checkpoint.load."""
    keep_every: int | None = None
    """With keep_last: checkpoints of iterations that this divides stay too."""
    local_interval: int | None = None
    """Iterations between copies of the state on the nodes' own disks, for restarts on the same layout; None: none."""
    local_dir: str | None = None
    """Where these go: a directory of every node's own, on its disk or in its memory (/dev/shm)."""
    local_replicas: int = 1
    """On how many other nodes a copy lies too, so that a node may come back empty."""
