"""Layer specs: which class stands for which part of a transformer layer."""

from collections.abc import Callable

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from scale_llm.config.errors import UserError
from scale_llm.config.model import Backend
from scale_llm.models.cached_attention import CachedSelfAttention
from scale_llm.models.layer import Layer
from scale_llm.models.torch_layers import (
    Activation,
    TorchAttention,
    TorchLayerNorm,
    TorchRMSNorm,
    TorchSelfAttention,
)


def choose_backend(backend: Backend, *, on_cuda: bool, low_rank: bool = False) -> Backend:
    """The backend that `auto` means on this device. low_rank: there are LoRA adapters, which are on torch's layers."""
    if backend is Backend.auto and low_rank:
        return Backend.torch
    if backend is not Backend.auto:
        if backend is Backend.transformer_engine and not on_cuda:
            raise UserError("model.backend=transformer_engine needs a GPU: use model.backend=torch on a CPU")
        return backend
    if on_cuda:
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError:
            return Backend.torch
        return Backend.transformer_engine
    return Backend.torch


def block_spec(
    config: TransformerConfig, backend: Backend, *, vp_stage: int | None, pp_rank: int,
    adapters: Callable[[ModuleSpec], None] | None = None,
):  # fmt: skip
    """Spec of the transformer block of one pipeline stage (and virtual stage). adapters: changes a layer's spec."""
    if backend is Backend.transformer_engine:
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, normalization=config.normalization, vp_stage=vp_stage, pp_rank=pp_rank
        )
        for layer in block.layer_specs:
            layer.module = Layer
            layer.submodules.self_attention.module = CachedSelfAttention
            _use_activation(layer.submodules.mlp, config)
        # Transformer Engine's kernel in place of half a dozen passes; packed rows have one of their own
        config.apply_rope_fusion = rope_utils.fused_apply_rotary_pos_emb_thd is not None
        return block
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer.module = Layer
    if backend is Backend.local:
        layer.submodules.self_attention.module = CachedSelfAttention
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        norm = WrappedTorchNorm
    else:
        norm = TorchRMSNorm if config.normalization == "RMSNorm" else TorchLayerNorm
        _use_torch_layers(layer.submodules, norm, config)
    if adapters is not None:
        adapters(layer.submodules)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def _use_torch_layers(layer, norm, config: TransformerConfig) -> None:
    """Replaces norms, attention and activation of megatron-core's local layer spec."""
    layer.input_layernorm = norm
    layer.pre_mlp_layernorm = norm
    layer.self_attention.module = TorchSelfAttention
    attention = layer.self_attention.submodules
    attention.core_attention = TorchAttention
    # An identity is megatron-core's way to say no norm.
    attention.q_layernorm = attention.k_layernorm = norm if config.qk_layernorm else None
    if config.num_moe_experts:
        # Experts read an unfused norm, under Transformer Engine too: it keeps its own name in checkpoints.
        layer.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    _use_activation(layer.mlp, config)


def _use_activation(mlp: ModuleSpec, config: TransformerConfig) -> None:
    """One pass where megatron-core's MLP has several."""
    config.use_te_activation_func = True  # its way to say that the MLP's spec brings an activation module
    parts = mlp.submodules
    experts = config.num_moe_experts is not None
    for spec in [parts.experts.submodules, getattr(parts, "shared_experts", None)] if experts else [parts]:
        if spec is not None:
            spec.activation_func = Activation
