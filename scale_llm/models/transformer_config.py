"""Our config groups -> megatron-core's TransformerConfig."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from scale_llm.config.model import ModelConfig, RouterBalancing
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.precision import PrecisionConfig
from scale_llm.config.train import CudaGraphImpl, RecomputeGranularity, TrainConfig


def openai_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def model_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Number format of weights and activations."""
    return torch.bfloat16 if precision.bf16 else torch.float16 if precision.fp16 else torch.float32


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    """megatron-core marks weights as sharded while it initialises them; `models.init` draws the values."""
    return weight


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, train: TrainConfig, *, on_cuda: bool
) -> TransformerConfig:
    """TransformerConfig of one role. Derived sizes (ffn_hidden_size, ...) must be resolved already."""
    dtype = model_dtype(precision)
    recompute = train.recompute_granularity
    full = recompute is RecomputeGranularity.full
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization.value,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else openai_gelu if model.openai_gelu else F.gelu,
        window_size=None if model.window_size is None else (model.window_size - 1, 0),
        # Transformer Engine's ring of point-to-point sends has no window; gathered keys and values have
        cp_comm_type="all_gather" if model.window_size and parallel.context_parallel_size > 1 else None,
        bias_activation_fusion=False,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        init_method_std=model.init_method_std,
        num_moe_experts=model.num_experts,
        moe_router_topk=model.moe_router_topk,
        moe_router_pre_softmax=model.moe_router_pre_softmax,
        moe_ffn_hidden_size=(model.moe_ffn_hidden_size or model.ffn_hidden_size) if model.num_experts else None,
        moe_aux_loss_coeff=_aux_loss_coeff(model, parallel),
        moe_router_load_balancing_type=_balancing(model),
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=precision.bf16,
        fp16=precision.fp16,
        **_fp8(precision),
        attention_softmax_in_fp32=True,
        # Batched point-to-point over gloo pairs the wrong messages where both neighbours are one rank (PP=2 with VPP).
        batch_p2p_comm=on_cuda and not parallel.overlap_p2p_comm,
        overlap_p2p_comm=parallel.overlap_p2p_comm,
        tp_comm_overlap=parallel.tp_comm_overlap,
        # gloo still reads what it sends when the schedule gives it up; NCCL's stream keeps it
        deallocate_pipeline_outputs=on_cuda or not parallel.overlap_p2p_comm,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=(
            layers._grad_accum_fusion_available
            and precision.accumulate_allreduce_grads_in_fp32
            # Marks of Python would not be set where a graph is replayed
            and train.cuda_graph_impl is CudaGraphImpl.none
        ),
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        recompute_granularity=None if recompute is RecomputeGranularity.none else recompute.value,
        recompute_method=train.recompute_method.value if full else None,
        recompute_num_layers=train.recompute_num_layers if full else None,
        recompute_modules=["core_attn"],
        use_cpu_initialization=False,
    )


def _fp8(precision: PrecisionConfig) -> dict[str, Any]:
    """megatron-core's keys of the same names; empty without FP8."""
    if precision.fp8 is None:
        return {}
    return {
        "fp8": precision.fp8.value,
        "fp8_recipe": precision.fp8_recipe.value,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo.value,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def _aux_loss_coeff(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Coefficient of the load-balancing loss, made independent of the layout.

    With per-token normalisation megatron-core 0.16.1 weighs a router's partial loss by its own tokens, not by those
    of all ranks that share the micro-batch, so that tensor and context parallelism would each divide the loss by their
    size.
    """
    if not model.num_experts:
        return 0.0
    shards = parallel.context_parallel_size
    if parallel.sequence_parallel:
        shards *= parallel.tensor_model_parallel_size
    return model.moe_aux_loss_coeff * shards


def _balancing(model: ModelConfig) -> str:
    return (
        "none"
        if model.moe_router_load_balancing_type is RouterBalancing.none
        else (model.moe_router_load_balancing_type.value)
    )
