"""A run's whole state to a checkpoint and back."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from scale_llm import __version__
from scale_llm.checkpoint.checkpointer import load_sharded, per_rank_object, read_plain
from scale_llm.checkpoint.huggingface.loading import load_huggingface
from scale_llm.config.checkpoint_files import is_huggingface
from scale_llm.config.io import save_config
from scale_llm.config.model import ModelConfig
from scale_llm.config.run import RunConfig
from scale_llm.engine import state as engine_state
from scale_llm.engine.engine import Engine
from scale_llm.parallel.rng import rng_state, set_rng_state
from scale_llm.stages.base import Stage
from scale_llm.stages.progress import Progress

CHECKPOINT_VERSION = 3.0
"""Megatron-LM's number for this layout of names."""


def state_to_save(stage: Stage, progress: Progress) -> dict[str, Any]:
    """The sharded state dict of everything that a resumed run needs."""
    model = engine_state.sharded_model_state(stage.engine)
    return {
        **model,
        "optimizer": engine_state.sharded_optimizer_state(stage.engine, model, loading=False),
        "rng_state": per_rank_object("rng_state", rng_state()),
        **_plain(stage, progress),
    }


def _plain(stage: Stage, progress: Progress) -> dict[str, Any]:
    return {
        "checkpoint_version": CHECKPOINT_VERSION,
        "written_by": f"scale_llm {__version__}",
        "iteration": progress.iteration,
        "progress": progress.as_dict(),
        "world_size": dist.get_world_size(),
        "engine": engine_state.plain_state(stage.engine),
        "stage": stage.state(),
    }


def write_config(cfg: RunConfig):
    """What to add to a checkpoint's directory: the resolved configuration of the run that wrote it."""
    return lambda directory: save_config(cfg, directory)


def load_weights(engine: Engine, path: Path, model: ModelConfig) -> None:
    """The weights alone, from a checkpoint of any layout or from a Hugging Face model."""
    wanted = engine_state.sharded_model_state(engine)
    if is_huggingface(path):
        load_huggingface(path, wanted, model)
        engine_state.follow_weights(engine)
    else:
        main_weights = engine.optimizer is not None
        engine_state.load_model_state(engine, load_sharded(path, wanted), main_weights=main_weights)


def restore(stage: Stage, path: Path, cfg: RunConfig, *, own: bool) -> Progress:
    """Loads a checkpoint of any layout into the stage.

    own: the run's own checkpoint, so everything is restored; else checkpoint.finetune and no_load_* say what is left
    out.
    """
    if is_huggingface(path):
        load_weights(stage.engine, path, cfg.model)
        return Progress()
    plain = read_plain(path)
    options = cfg.checkpoint
    # A checkpoint without a run's state is a converted one, or Megatron-LM's: its weights are all that we take.
    finetune = (options.finetune and not own) or "engine" not in plain
    with_optimizer = own or not (finetune or options.no_load_optim)
    same_ranks = plain.get("world_size") == dist.get_world_size()
    with_rng = same_ranks and (own or not (finetune or options.no_load_rng))
    wanted = dict(engine_state.sharded_model_state(stage.engine))
    if with_optimizer:
        wanted["optimizer"] = engine_state.sharded_optimizer_state(stage.engine, wanted, loading=True)
    if with_rng:
        wanted["rng_state"] = per_rank_object("rng_state", None)
    loaded = load_sharded(path, wanted)
    engine_state.load_model_state(stage.engine, loaded, main_weights=not with_optimizer)
    if with_optimizer:
        engine_state.load_optimizer_state(stage.engine, loaded["optimizer"], plain["engine"])
    if finetune:
        return Progress()
    engine_state.load_schedule(stage.engine, plain["engine"])
    stage.load_state(plain["stage"])
    if with_rng:
        set_rng_state(loaded["rng_state"])
    return Progress(**plain["progress"])
