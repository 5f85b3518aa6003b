"""FP8 products of Transformer Engine's linear layers: when, over which ranks their scales are agreed on, and the state
of delayed scaling as plain tensors.

megatron-core opens Transformer Engine's FP8 context for each pass (`fp8_utils.get_fp8_context`), with the group of
ranks from its global state, which is never initialised here: scales would then be reduced over all ranks of the job.
Delayed scaling keeps, for each layer and direction, a scale and a history of largest numbers. Transformer Engine saves
them as a pickle (`_extra_state`) and unpickles it on loading, which runs whatever code it names; here they are tensors
of a checkpoint like any other.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig

PREFIX = "optimizer.fp8."
"""Names in checkpoints begin so: state of training, which readers of weights pass over."""

_DIRECTIONS = {"scaling_fwd": "fwd", "scaling_bwd": "bwd"}
_enabled = True


class _Group:
    """A process group on a configuration that megatron-core copies."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __deepcopy__(self, memo):
        return self


def use_group(config: TransformerConfig, group: dist.ProcessGroup) -> None:
    """Models of this configuration agree on scales over the ranks of the group: those of one pipeline stage, which run
    the same layers in the same order."""
    config.fp8_group = _Group(group)
    transformer_block.get_fp8_context = context


def context(config: TransformerConfig, layer_no: int = -1, is_init: bool = False) -> AbstractContextManager:
    """In place of megatron-core's. layer_no: from 0 on over the whole model; -1: all layers."""
    if not config.fp8 or is_init or not _enabled or fp8_utils.is_first_last_bf16_layer(config, layer_no):
        return nullcontext()
    import transformer_engine.pytorch

    return transformer_engine.pytorch.fp8_autocast(
        enabled=True, fp8_recipe=fp8_utils.get_fp8_recipe(config), fp8_group=config.fp8_group.group
    )


@contextmanager
def disabled() -> Iterator[None]:
    """Passes run in BF16 while it lasts. Generation does: its rows have any number of tokens, FP8 wants multiples."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def is_delayed(config: TransformerConfig) -> bool:
    """Whether scales come from the past, and so are state."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def begin(modules: Iterable[torch.nn.Module], config: TransformerConfig) -> None:
    """Makes the state of delayed scaling, which Transformer Engine would make in the first pass: a checkpoint can be
    saved or loaded before it. modules: this rank's chunks of the model."""
    if not is_delayed(config):
        return
    with torch.no_grad(), context(config):
        for _, layer in _linear_layers(modules):
            recipe = fp8_utils.get_fp8_recipe(config)
            layer.fp8_meta |= {"num_gemms": 1, "recipe": recipe}
            layer.init_fp8_meta_tensors(recipe)


def state(modules: Iterable[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The state of delayed scaling by global names, the tensors themselves: scale [n], amax_history [length, n] for the
    n matrices of a layer's pass in either direction; {} where there is none."""
    found = {}
    for name, layer in _linear_layers(modules):
        for key, direction in _DIRECTIONS.items():
            of_direction = layer.fp8_meta.get(key)
            for tensor in ("scale", "amax_history"):
                value = getattr(of_direction, tensor, None)
                if hasattr(of_direction, "amax_history") and value is not None:
                    found[f"{PREFIX}{name}.{tensor}_{direction}"] = value
    return found


def sharded_state(modules: Iterable[torch.nn.Module], groups: Any) -> dict[str, ShardedTensor]:
    """The same for a checkpoint. All ranks of a pipeline stage have the same: one of them writes.

    groups: megatron-core's collection of the model's mesh.
    """
    replica = (0, groups.tp.rank(), groups.dp_cp.rank())
    return {
        name: ShardedTensor.from_rank_offsets(name, tensor.detach(), replica_id=replica)
        for name, tensor in state(modules).items()
    }


@torch.no_grad()
def load(modules: Iterable[torch.nn.Module], loaded: dict[str, torch.Tensor]) -> None:
    """Tensors by the names of `state`; what is not among them begins anew."""
    for name, tensor in state(modules).items():
        if name in loaded:
            tensor.copy_(loaded[name])
        else:
            tensor.fill_(0.0 if "amax_history" in name.rpartition(".")[2] else 1.0)


@contextmanager
def unchanged(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """What passes without gradients put into the history is taken out again: they must not change training."""
    before = {name: tensor.clone() for name, tensor in state(modules).items()}
    try:
        yield
    finally:
        load(modules, before)


def forget_copies(modules: Iterable[torch.nn.Module]) -> None:
    """Gives the memory of weights in FP8 back; the next pass makes them anew from those in BF16."""
    for _, layer in _linear_layers(modules):
        layer._fp8_workspaces.clear()
    base = sys.modules.get("transformer_engine.pytorch.module.base")
    getattr(base, "_dummy_wgrads", {}).clear()  # one of each shape of weight, for gradients that are elsewhere


def _linear_layers(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    """(global name, module) of Transformer Engine's modules with a weight: attention has FP8 state too, and no use for
    it here."""
    for module in modules:
        for layer in module.decoder.layers:
            for name, part in layer.named_modules():
                if hasattr(part, "_fp8_workspaces") and getattr(part, "weight", None) is not None:
                    yield f"decoder.layers.{layer.layer_number - 1}.{name}", part
