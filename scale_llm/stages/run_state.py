"""A run's whole state to a checkpoint and back."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from scale_llm import __version__
from scale_llm.checkpoint.bases import base_of
from scale_llm.checkpoint.checkpointer import load_sharded, per_rank_object, read_plain
from scale_llm.checkpoint.huggingface.loading import load_huggingface
from scale_llm.checkpoint.whole import refuse_damaged
from scale_llm.checkpoint.writing import write_tokenizer
from scale_llm.config.checkpoint_files import CHECKPOINT_VERSION, is_huggingface
from scale_llm.config.errors import UserError
from scale_llm.config.io import save_config
from scale_llm.config.peft import PeftMethod
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.engine import state as engine_state
from scale_llm.engine.engine import Engine
from scale_llm.engine.offload import on_device
from scale_llm.engine.state import Weights
from scale_llm.models.fp8 import PREFIX as FP8
from scale_llm.models.heads import HEAD
from scale_llm.parallel.rng import rng_state, set_rng_state
from scale_llm.stages.base import Stage
from scale_llm.stages.context import RunContext
from scale_llm.stages.progress import Progress


def state_to_save(stage: Stage, progress: Progress, host_group: dist.ProcessGroup) -> dict[str, Any]:
    """The sharded state dict of everything that a resumed run needs. A collective of the whole job, host_group."""
    state: dict[str, Any] = {"rng_state": per_rank_object("rng_state", rng_state()), **plain_progress(stage, progress)}
    for name, engine in stage.engines.items():
        whole = {} if engine is None else _wanted(engine, _saved(engine), with_optimizer=True, loading=False)
        plain = _first(None if engine is None else engine_state.plain_state(engine), host_group)
        if name:
            state[name] = engine_state.named(whole, name)
            state["engines"] = {**state.get("engines", {}), name: plain}
        else:
            state |= {**whole, "engine": plain}
    return state


def gradients(stage: Stage) -> list[torch.Tensor]:
    """Memory of this rank that no checkpoint holds."""
    engines = (engine for engine in stage.engines.values() if engine is not None)
    return [buffer for engine in engines for buffer in engine_state.gradient_buffers(engine)]


def _wanted(engine: Engine, weights: Weights, *, with_optimizer: bool, loading: bool) -> dict[str, Any]:
    """A model and its optimizer as sharded tensors."""
    state = dict(engine_state.sharded_model_state(engine, weights, loading=loading))
    if with_optimizer:
        state |= {"fp8": scales} if (scales := engine_state.sharded_fp8_state(engine)) else {}
        state["optimizer"] = engine_state.sharded_optimizer_state(engine, dict(state), loading=loading)
    return state


def _first(value: Any, group: dist.ProcessGroup) -> Any:
    """What the first rank has that has anything, on every rank."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return next(value for value in values if value is not None)


def _saved(engine: Engine) -> Weights:
    """What a checkpoint of this model holds: a frozen base is in the checkpoint that the run began from."""
    return Weights.adapters if engine.has_adapters else Weights.all


def plain_progress(stage: Stage, progress: Progress) -> dict[str, Any]:
    """How far the run is, the same on every rank."""
    return {
        "checkpoint_version": CHECKPOINT_VERSION,
        "written_by": f"scale_llm {__version__}",
        "iteration": progress.iteration,
        "progress": progress.as_dict(),
        "world_size": dist.get_world_size(),
        "stage": stage.state(),
    }


def write_files(run: RunContext):
    """What to add to a checkpoint's directory: the resolved configuration of the run that wrote it, its tokenizer."""

    def write(directory: Path) -> None:
        save_config(run.cfg, directory)
        template = getattr(run.prepared, "chat_template", None)
        write_tokenizer(Path(run.prepared.tokenizer_path), directory, template)

    return write


def load_weights(run: RunContext, engine: Engine | None, path: Path) -> None:
    """The weights alone, from a checkpoint of any layout or from a Hugging Face model.

    A checkpoint of adapters gives them and what lies under them. A collective of the whole
    job: engine is None on ranks that hold no part of the model.
    """
    has_adapters = run.cfg.peft.method is not PeftMethod.none
    base = base_of(path)
    if base is not None and not has_adapters:
        raise UserError(
            f"{path}: holds adapters alone; merge them into their base with "
            f"tools/convert_checkpoint.py merge {path} OUT, and give that"
        )
    _load(run, engine, base or path, Weights.base if has_adapters else Weights.all)
    if has_adapters and engine is not None:
        engine.begin_adapters(prompt_tokens(run))
    if base is not None:
        _load(run, engine, path, Weights.adapters)


def _load(run: RunContext, engine: Engine | None, path: Path, weights: Weights) -> None:
    wanted = {} if engine is None else engine_state.sharded_model_state(engine, weights, loading=True)
    if is_huggingface(path):
        load_huggingface(path, wanted, run.cfg.model)
        if engine is not None:
            engine_state.follow_weights(engine)
        return
    refuse_damaged(path, run.mesh.host_group, hashing=run.cfg.checkpoint.verify)
    loaded = load_sharded(path, wanted, optional=HEAD)
    if engine is not None:
        engine_state.load_model_state(engine, loaded, main_weights=engine.optimizer is not None)


def prompt_tokens(run: RunContext) -> list[int]:
    """Tokens that virtual ones begin as: of peft.prompt_init_text, else drawn from the vocabulary."""
    peft = run.cfg.peft
    if peft.prompt_init_text:
        return Tokenizer.load(run.prepared.tokenizer_path, run.cfg.tokenizer.eod_token).encode(peft.prompt_init_text)
    random = np.random.Generator(np.random.Philox(run.cfg.train.seed))
    return random.integers(run.vocab_size, size=max(peft.num_virtual_tokens, 1)).tolist()


def restore(run: RunContext, stage: Stage, path: Path, *, own: bool) -> Progress:
    """Loads a checkpoint of any layout into the stage. A collective of the whole job.

    own: the run's own checkpoint, found to be whole, so everything is restored; else checkpoint.finetune and no_load_*
    say what is left out.
    """
    cfg = run.cfg
    if is_huggingface(path):
        load_huggingface(path, engine_state.sharded_model_state(stage.engine), cfg.model)
        engine_state.follow_weights(stage.engine)
        return Progress()
    if not own:
        refuse_damaged(path, run.mesh.host_group, hashing=cfg.checkpoint.verify)
    plain = read_plain(path)
    options = cfg.checkpoint
    # A checkpoint without a run's state is a converted one, or Megatron-LM's: its weights are all that we take.
    finetune = (options.finetune and not own) or "engine" not in plain
    with_optimizer = own or not (finetune or options.no_load_optim)
    same_ranks = plain.get("world_size") == dist.get_world_size()
    with_rng = same_ranks and (own or not (finetune or options.no_load_rng))
    with on_device(stage.engines.values()):
        wanted: dict[str, Any] = {}
        for name, engine in stage.engines.items():
            whole = {}
            if engine is not None:
                whole = _wanted(engine, _saved(engine), with_optimizer=with_optimizer, loading=True)
            wanted |= {name: engine_state.named(whole, name)} if name else whole
        if with_rng:
            wanted["rng_state"] = per_rank_object("rng_state", None)
        loaded = load_sharded(path, wanted, optional=FP8)
        for name, engine in stage.engines.items():
            if engine is None:
                continue
            part = loaded[name] if name else loaded
            own_plain = plain["engines"][name] if name else plain.get("engine")
            engine_state.load_model_state(engine, part, main_weights=not with_optimizer)
            if with_optimizer:
                engine_state.load_optimizer_state(engine, part["optimizer"], own_plain)
                engine_state.load_fp8_state(engine, part.get("fp8", {}))
            if not finetune:
                engine_state.load_schedule(engine, own_plain)
    if finetune:
        return Progress()
    stage.load_state(plain["stage"])
    if with_rng:
        set_rng_state(loaded["rng_state"])
    return Progress(**plain["progress"])
