"""megatron-core's linear layers with low-rank matrices beside their weights, put into a layer spec."""

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec

from scale_llm.config.peft import PeftConfig
from scale_llm.models.adapters.low_rank import LowRank, Rows
from scale_llm.models.adapters.quantised import Nf4Weight, quantised_linear


class Adapted:
    """What comes before a linear layer of megatron-core in a class that has an adapter."""

    adapter: LowRank
    enabled = True
    _nf4: Nf4Weight | None = None

    def __init__(self, *args, rows_of, parts: list[str], peft: PeftConfig, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapter = LowRank(
            self, rows_of(self), parts, peft, row_parallel=isinstance(self, RowParallelLinear)
        )  # fmt: skip

    def forward(self, x, *args, **kwargs):
        out, bias = super().forward(x, *args, **kwargs)
        if not self.enabled:
            return out, bias
        delta = self.adapter(x)
        if not self.adapter.dora:
            return out + delta, bias
        added = self.bias if self.bias is not None and not self.skip_bias_add else None
        base = out if added is None else out - added
        lengths = self.adapter.lengths(self.whole_weight())
        whole = (base + delta) * (self.adapter.magnitude(lengths) / lengths).to(out.dtype)
        return whole if added is None else whole + added, bias

    def _forward_impl(self, input, weight, bias=None, *, allreduce_dgrad, sequence_parallel, **kwargs):
        if self._nf4 is None:
            return super()._forward_impl(
                input, weight, bias=bias, allreduce_dgrad=allreduce_dgrad, sequence_parallel=sequence_parallel, **kwargs
            )
        return quantised_linear(
            self, self._nf4, input, bias, allreduce_dgrad=allreduce_dgrad, sequence_parallel=sequence_parallel
        )

    def whole_weight(self) -> torch.Tensor:
        """The frozen weight [out or out/p, in or in/p]."""
        return self.weight if self._nf4 is None else self._nf4.whole()

    def begin(self, *, quantise: bool) -> None:
        """Once the base is loaded: into 4 bits if asked for; DoRA takes its lengths from it."""
        if quantise:
            self._nf4 = Nf4Weight(self.weight)
            # Of the same shape, for code that asks for it, but without memory of its own.
            self.weight.data = self.weight.data.new_zeros(1).expand(self.weight.shape)
        if self.adapter.dora:
            self.adapter.start_magnitude(self.adapter.lengths(self.whole_weight()))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {**state, **self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)}


def quantised_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Frozen weights in 4 bits, which are no parameters."""
    for layer in module.modules():
        if isinstance(layer, Adapted) and layer._nf4 is not None:
            yield from layer._nf4.tensors()


@contextlib.contextmanager
def without_adapters(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """The models as they are under their low-rank adapters."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Adapted)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@functools.cache
def adapted(layer: type) -> type:
    """The class of a layer that has an adapter."""
    return type(f"Adapted{layer.__name__}", (Adapted, layer), {})


def adapt_spec(layer, parts: dict[str, list[str]], peft: PeftConfig) -> None:
    """Gives the linear layers of a transformer layer's spec adapters. parts: module -> parts that get matrices."""
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    feed_forward = [mlp]
    if getattr(mlp, "experts", None) is not None:
        feed_forward = [part.submodules for part in (mlp.experts, mlp.shared_experts) if part is not None]
    for name, names in parts.items():
        for submodules in [attention] if name in ("linear_qkv", "linear_proj") else feed_forward:
            kind = getattr(submodules, name)
            if not issubclass(kind, ColumnParallelLinear | RowParallelLinear):
                raise TypeError(f"{kind.__name__} has no form with an adapter")
            params = {"rows_of": _ROWS[name], "parts": names, "peft": peft}
            setattr(submodules, name, ModuleSpec(module=adapted(kind), params=params))


def _qkv_rows(layer) -> Rows:
    config = layer.config
    size = config.kv_channels
    heads = config.num_attention_heads // config.num_query_groups
    groups = layer.output_size_per_partition // ((heads + 2) * size)
    return Rows(groups=groups, rows={"q": heads * size, "k": size, "v": size})


def _fc1_rows(layer) -> Rows:
    rows = layer.output_size_per_partition
    return Rows(groups=1, rows={"gate": rows // 2, "up": rows // 2} if layer.config.gated_linear_unit else {"up": rows})


_ROWS = {
    "linear_qkv": _qkv_rows,
    "linear_fc1": _fc1_rows,
    "linear_proj": lambda layer: Rows(groups=1, rows={"o": layer.output_size}),
    "linear_fc2": lambda layer: Rows(groups=1, rows={"down": layer.output_size}),
}
"""Module -> the rows of its parts on this rank."""
