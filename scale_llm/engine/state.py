"""The engine's state as a sharded state dict that any layout, and either optimizer, can load.

Optimizer tensors have the names that megatron-core gives them, `optimizer.state.<name>.<parameter>`, whole and cut
like their parameter, whether the optimizer that saved them was distributed or not. FP32 runs have no `fp32_param`: the
model's own weights are the main weights.
"""

from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from scale_llm.engine.distributed_state import sharded_ranges
from scale_llm.engine.engine import Engine
from scale_llm.engine.optimizer import is_distributed, parts, set_steps
from scale_llm.models import fp8
from scale_llm.models.adapters.names import is_adapter
from scale_llm.models.heads import is_head

_PREFIX = "optimizer.state"
_EXTRA = "_extra_state"


class Weights(Enum):
    """Which of a model's weights: all (of one without adapters), those under adapters, or the adapters."""

    all = "all"
    base = "base"
    adapters = "adapters"


def sharded_model_state(engine: Engine, which: Weights = Weights.all, *, loading: bool = False) -> dict[str, Any]:
    """{"model": ...} or, with virtual pipeline stages, {"model0": ..., "model1": ...}, as Megatron-LM saves them."""
    engine.gather_parameters()
    metadata = _metadata(engine)
    states = [module.sharded_state_dict(metadata=metadata) for module in engine.modules]
    states = [_without_pickles(state, loading=loading) for state in states]
    if which is not Weights.all:
        wanted = which is Weights.adapters
        states = [{key: value for key, value in state.items() if is_adapter(key) == wanted} for state in states]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{i}": state for i, state in enumerate(states)}


def _without_pickles(state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """Without what Transformer Engine would unpickle: its `_extra_state` is bytes, that of megatron-core's own layers
    None, as which all are saved. The state of FP8 is saved as tensors (`models.fp8`)."""
    pickled = [
        key for key, leaf in state.items() if isinstance(leaf, ShardedObject) and isinstance(leaf.data, torch.Tensor)
    ]
    if loading:
        return {key: leaf for key, leaf in state.items() if key not in pickled}
    return state | {key: replace(state[key], data=None) for key in pickled}


def sharded_fp8_state(engine: Engine) -> dict[str, ShardedTensor]:
    """Scales and histories of delayed scaling, tensors by their names."""
    return fp8.sharded_state(engine.modules, engine.mesh.groups)


def load_fp8_state(engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
    """What a checkpoint has of it; the rest begins anew."""
    fp8.load(engine.modules, tensors)


def sharded_optimizer_state(engine: Engine, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """Tensors of every optimizer part, by position."""
    assert engine.optimizer is not None
    engine.require_weights()
    by_parameter = {
        id(leaf.data): leaf
        for leaf in nested_values(model_state)
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory)
    }
    state: dict[str, Any] = {}
    for i, part in enumerate(parts(engine.optimizer)):
        if part.optimizer is None:
            continue
        if is_distributed(part):
            state[f"part{i}"] = _with_our_names(
                _distributed_state(part, model_state, by_parameter, loading, engine), engine
            )
        else:
            state[f"part{i}"] = _replicated_state(part, by_parameter)
    return state


def _distributed_state(
    part, model_state: dict[str, Any], by_parameter: dict[int, ShardedBase], loading: bool, engine: Engine
) -> dict[Any, dict]:
    """Whole tensors to load into; this rank's ranges to save, or whole ones too where these cannot be told."""
    ranges = None if loading else sharded_ranges(part, by_parameter, _PREFIX)
    if ranges is not None:
        return ranges
    return part.sharded_param_state_fully_reshardable(model_state, loading, _metadata(engine))


def gradient_buffers(engine: Engine) -> list[torch.Tensor]:
    """What gradients are summed in: nothing of the state."""
    chunks = engine.chunks if engine.optimizer is not None else []
    return [buffer.grad_data for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def named(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The same state with `<name>.` before every tensor's name in checkpoints."""
    add_prefix_for_sharding(state, f"{name}.")
    return state


def plain_state(engine: Engine) -> dict[str, Any]:
    """Numbers that are the same on every rank."""
    assert engine.optimizer is not None and engine.scheduler is not None
    scalers = [part.grad_scaler for part in parts(engine.optimizer) if getattr(part, "grad_scaler", None)]
    return {
        "optimizer_steps": engine.updates,
        "grad_scaler": _scaler_state(scalers[0]) if scalers else None,
        "opt_param_scheduler": engine.scheduler.state_dict(),
    }


def load_model_state(engine: Engine, state: dict[str, Any], *, main_weights: bool) -> None:
    """Weights. main_weights: the optimizer's follow them, for they are not loaded themselves.

    Loading fills tensors in place, so main weights that came from the checkpoint must not be touched here.
    """
    engine.require_weights()
    for i, module in enumerate(engine.modules):
        part = state["model" if len(engine.modules) == 1 else f"model{i}"]
        found = module.load_state_dict(part, strict=False)  # a base, its adapters and a new head are apart
        ours = [key for key in found.missing_keys if not key.endswith(_EXTRA)]
        apart = [key for key in ours if not (is_adapter(key) or engine.has_adapters or is_head(key))]
        assert not apart and not found.unexpected_keys, f"{apart}, {found.unexpected_keys}"
    if main_weights:
        follow_weights(engine)


def follow_weights(engine: Engine) -> None:
    """The optimizer's main weights become the model's, which have been changed behind its back."""
    engine.require_weights()
    if engine.optimizer is not None:
        engine.optimizer.reload_model_params()


def load_optimizer_state(engine: Engine, tensors: dict[str, Any], plain: dict[str, Any]) -> None:
    """Optimizer tensors, step counts and the FP16 loss scale. Weights must have been loaded before."""
    assert engine.optimizer is not None
    engine.require_weights()
    for i, part in enumerate(parts(engine.optimizer)):
        if part.optimizer is None:
            continue
        loaded = tensors[f"part{i}"]
        if is_distributed(part):
            _load_distributed(part, loaded)
        else:
            _copy_replicated_state(part, loaded)
        set_steps(part.optimizer, plain["optimizer_steps"])
        scaler = getattr(part, "grad_scaler", None)
        if scaler and plain["grad_scaler"]:
            _load_scaler(scaler, plain["grad_scaler"])
    engine.updates = plain["optimizer_steps"]


def load_numbers(engine: Engine, plain: dict[str, Any]) -> None:
    """What `plain_state` returned, into an engine that has its tensors back."""
    assert engine.optimizer is not None
    for part in parts(engine.optimizer):
        if part.optimizer is not None:
            set_steps(part.optimizer, plain["optimizer_steps"])
        scaler = getattr(part, "grad_scaler", None)
        if scaler and plain["grad_scaler"]:
            _load_scaler(scaler, plain["grad_scaler"])
    engine.updates = plain["optimizer_steps"]
    load_schedule(engine, plain)


def load_schedule(engine: Engine, plain: dict[str, Any]) -> None:
    """Position in the learning-rate schedule; its shape is the configuration's."""
    engine.scheduler.num_steps = 0  # megatron-core adds to where it stands
    engine.scheduler.load_state_dict(plain["opt_param_scheduler"])


def _metadata(engine: Engine) -> dict[str, Any]:
    return {
        "dp_cp_group": engine.mesh.groups.dp_cp,
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }


def _main_parameters(part) -> list[tuple[torch.nn.Parameter, torch.Tensor, bool]]:
    """(model parameter, main parameter, whether the main one is a copy) of a replicated optimizer."""
    if not hasattr(part, "float16_groups"):
        return [(p, p, False) for group in part.optimizer.param_groups for p in group["params"]]
    copies = [
        (model, main, True)
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        for model, main in zip(models, mains, strict=True)
    ]
    return copies + [(p, p, False) for group in part.fp32_from_fp32_groups for p in group]


def _replicated_state(part, by_parameter: dict[int, ShardedBase]) -> dict[str, Any]:
    state = {}
    for i, (model, main, copied) in enumerate(_main_parameters(part)):
        tensors = {k: v for k, v in part.optimizer.state[main].items() if k != "step" and v is not None}
        if copied:
            tensors["fp32_param"] = main
        sharded = by_parameter[id(model)]
        state[str(i)] = {
            name: make_sharded_optimizer_tensor(sharded, tensor.detach(), prefix=f"{_PREFIX}.{name}")
            for name, tensor in tensors.items()
        }
    return state


def _copy_replicated_state(part, loaded: dict[str, Any]) -> None:
    with torch.no_grad():
        for i, (_, main, copied) in enumerate(_main_parameters(part)):
            for name, tensor in loaded[str(i)].items():
                if name == "fp32_param":
                    assert copied
                    main.copy_(tensor)
                else:
                    part.optimizer.state[main][name].copy_(tensor)


def _with_our_names(tensors: dict[Any, dict], engine: Engine) -> dict[str, Any]:
    """A distributed optimizer's tensors under the names of a replicated one's.

    Its main weights, `param`, become `fp32_param`; in FP32 they are the model's and saved once.
    """
    renamed = {}
    for i, entry in tensors.items():
        entry = dict(entry)
        main = entry.pop("param")
        if engine.config.params_dtype != torch.float32:
            ours = {place: _renamed(one) for place, one in main.items()} if isinstance(main, dict) else _renamed(main)
            entry["fp32_param"] = ours
        renamed[str(i)] = entry
    return renamed


def _renamed(main: ShardedBase) -> ShardedBase:
    return replace(main, key=main.key.replace(f"{_PREFIX}.param.", f"{_PREFIX}.fp32_param.", 1))


def _load_distributed(part, loaded: dict[str, Any]) -> None:
    """megatron-core's loader copies every tensor of the state but knows no step counts; they are set afterwards."""
    states = part.optimizer.state.values()
    steps = [state.pop("step", None) for state in states]
    part.load_parameter_state_from_fully_reshardable(_with_weights(loaded, part))
    for state, step in zip(states, steps, strict=True):
        if step is not None:
            state["step"] = step


def _with_weights(loaded: dict[str, Any], part) -> dict[int, dict]:
    """Adds the main weights a distributed FP32 optimizer asks for: the model's, which are loaded already."""
    entries = {int(i): entry for i, entry in loaded.items()}
    index = 0
    for buffer in part.buffers:
        for parameter in buffer.param_index_map:
            if "fp32_param" not in entries[index]:
                entries[index]["fp32_param"] = parameter.detach().float()
            index += 1
    return entries


def _scaler_state(scaler) -> dict[str, Any]:
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in scaler.state_dict().items()}


def _load_scaler(scaler, state: dict[str, Any]) -> None:
    scaler._scale.fill_(state["scale"])
    scaler._growth_tracker = state["growth_tracker"]
    scaler._hysteresis_tracker = state["hysteresis_tracker"]
