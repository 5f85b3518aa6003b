"""Exact parameter counts of a GPT, whole and per rank, and its floating-point operations.

Names: h hidden size, f feed-forward size, a attention heads, g query groups, d head size, s sequence, v padded
vocabulary, L layers, E experts.
"""

import math
from dataclasses import dataclass

from scale_llm.config.model import ModelConfig, Normalization, PositionEmbedding
from scale_llm.config.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Parameters of the whole model by part; all layers together."""

    embedding: int
    """Token and position tables; a tied output table is this one."""
    attention: int
    mlp: int
    """Feed-forward layers, or router and all experts."""
    norms: int
    output: int
    """The output table where it is not tied."""
    inactive: int
    """Parameters of experts that a token does not visit."""

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.mlp + self.norms + self.output

    @property
    def active(self) -> int:
        """Parameters that take part in one token."""
        return self.total - self.inactive


def padded_vocab_size(model: ModelConfig, tensor_parallel: int) -> int:
    """Rows of the embedding: the next multiple of make_vocab_size_divisible_by times the tensor-parallel size."""
    return padded_rows(model.vocab_size or 1, model.make_vocab_size_divisible_by, tensor_parallel)


def padded_rows(vocab_size: int, divisible_by: int, tensor_parallel: int) -> int:
    """Megatron's rule for the rows of a vocabulary's tables."""
    unit = divisible_by * tensor_parallel
    return math.ceil(vocab_size / unit) * unit


def _norm(model: ModelConfig, size: int) -> int:
    return size * (2 if model.normalization is Normalization.LayerNorm else 1)


def _attention(model: ModelConfig, tp: int = 1) -> int:
    """One layer's query, key, value and output projections, with the norms of queries and keys; on 1 of tp ranks."""
    h, d, a = model.hidden_size, model.kv_channels or 0, model.num_attention_heads
    groups = model.num_query_groups or a
    qkv = (a + 2 * groups) * d
    count = (h * qkv + a * d * h) // tp
    if model.add_bias_linear or model.add_qkv_bias:
        count += qkv // tp
    if model.add_bias_linear:
        count += h
    return count + (2 * _norm(model, d) if model.qk_layernorm else 0)


def _feed_forward(model: ModelConfig, f: int, tp: int = 1) -> int:
    """One feed-forward layer, or one expert, on 1 of tp ranks."""
    gates = 2 if model.swiglu else 1
    count = (gates + 1) * model.hidden_size * f // tp
    return count + (gates * f // tp + model.hidden_size if model.add_bias_linear else 0)


def _position_table(model: ModelConfig) -> int:
    if model.position_embedding_type is not PositionEmbedding.learned_absolute:
        return 0
    return (model.max_position_embeddings or model.seq_length) * model.hidden_size


def count_parameters(model: ModelConfig, tensor_parallel: int = 1) -> ParameterCounts:
    """Parameters of the model whose vocabulary is padded for `tensor_parallel` ranks. Sizes must be resolved."""
    layers, h, experts = model.num_layers, model.hidden_size, model.num_experts
    table = padded_vocab_size(model, tensor_parallel) * h
    inactive = 0
    if experts is None:
        mlp = _feed_forward(model, model.ffn_hidden_size or 0)
    else:
        expert = _feed_forward(model, model.moe_ffn_hidden_size or 0)
        mlp = h * experts + experts * expert
        inactive = (experts - model.moe_router_topk) * expert
    return ParameterCounts(
        embedding=table + _position_table(model),
        attention=layers * _attention(model),
        mlp=layers * mlp,
        norms=(2 * layers + 1) * _norm(model, h),
        output=table if model.untie_embeddings_and_output_weights else 0,
        inactive=layers * inactive,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankParameters:
    """Parameters on one rank: those replicated over data parallel, and experts, which have fewer replicas."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def parameters_of_stage(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> RankParameters:
    """Parameters on a rank of pipeline stage `pp_rank`; a tied output table is held by first and last stage alike."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers, h = model.num_layers // pp, model.hidden_size
    table = padded_vocab_size(model, tp) * h // tp
    dense, experts = layers * (_attention(model, tp) + 2 * _norm(model, h)), 0
    if model.num_experts is None:
        dense += layers * _feed_forward(model, model.ffn_hidden_size or 0, tp)
    else:
        dense += layers * h * model.num_experts  # the router
        here = model.num_experts // parallel.expert_model_parallel_size
        expert_tp = parallel.expert_tensor_parallel_size or tp
        experts = layers * here * _feed_forward(model, model.moe_ffn_hidden_size or 0, expert_tp)
    if pp_rank == 0:
        dense += table + _position_table(model)
    if pp_rank == pp - 1:
        dense += _norm(model, h)
        if model.untie_embeddings_and_output_weights or pp > 1:
            dense += table
    return RankParameters(dense=dense, experts=experts)


def flops_per_token(model: ModelConfig, tensor_parallel: int = 1) -> float:
    """Floating-point operations of forward and backward for one token, recomputation not counted.

    6 N + 6 L a d s. Every weight that is in a matrix product (N: no tables that are looked up, norms or biases; the
    output table, tied or not, is one) is multiplied and added once forward and twice backward: 6 N, as in Kaplan et
    al. 2020, arXiv 2001.08361, section 2.1. Scores and their product with the values take 2 (2 a d s) forward, three
    times that in all: 12 L a d s, as in PaLM, arXiv 2204.02311, appendix B; halved because a causal mask leaves half
    of them, as Megatron-LM counts. Routed experts count as often as a token visits them.
    """
    layers, h, a, d = model.num_layers, model.hidden_size, model.num_attention_heads, model.kv_channels or 0
    groups = model.num_query_groups or a
    products = 3 if model.swiglu else 2
    attention = h * (a + 2 * groups) * d + a * d * h
    if model.num_experts is None:
        mlp = products * h * (model.ffn_hidden_size or 0)
    else:
        mlp = h * model.num_experts + model.moe_router_topk * products * h * (model.moe_ffn_hidden_size or 0)
    weights = layers * (attention + mlp) + padded_vocab_size(model, tensor_parallel) * h
    return 6.0 * weights + 6.0 * layers * a * d * model.seq_length
