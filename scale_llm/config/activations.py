"""Bytes of activations that one rank holds at the peak of a step: an estimate, as kernels differ in what they keep.

After Korthikanti et al. 2022, arXiv 2205.05198, section 4. Where it departs: attention keeps its queries, keys, values,
result and a logarithm a row (Dao et al. 2022, arXiv 2205.14135) and no matrix of queries x keys, but for
model.backend=local; the MLP may have a gate, and keys fewer heads; numbers are as wide as the weights; dropout counts
only where there is any; and logits are kept once in the model's format with their gradient, no copy in FP32. Not
counted: keys and values that model.backend=torch gathers over context-parallel ranks.

Names: n tokens of a micro-batch on this rank, h hidden size, f feed-forward size, a attention heads, g query groups, d
head size, s sequence, v padded vocabulary, t tensor-parallel size, e bytes of a number, L layers.
"""

from dataclasses import dataclass

from scale_llm.config.model import Backend, Head, ModelConfig
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.parameters import padded_vocab_size
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import Batching, SequenceStageConfig, answers_in_a_row
from scale_llm.config.train import RecomputeGranularity, RecomputeMethod, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerActivations:
    """Bytes that one layer keeps for its backward pass."""

    input: int
    """The layer's input alone, which is all that full recomputation keeps."""
    attention: int
    """Inputs and outputs of norms and projections, queries, keys and values."""
    core: int
    """What selective recomputation leaves out: logarithms of sums, or the matrix of scores."""
    mlp: int
    """What the feed-forward layer or the experts keep, their norm apart."""

    @property
    def total(self) -> int:
        return self.input + self.attention + self.core + self.mlp


def micro_batch_tokens(cfg: RunConfig) -> int:
    """Tokens of one micro-batch over all context-parallel ranks."""
    stage, train = cfg.stage, cfg.train
    if isinstance(stage, SequenceStageConfig) and stage.batching is Batching.token_budget:
        return stage.max_tokens_per_micro_batch or 0
    return train.micro_batch_size * cfg.model.seq_length * answers_in_a_row(stage)


def activation_bytes(cfg: RunConfig, *, number_bytes: int, pp_rank: int, micro_batches: int) -> int:
    """At the peak of a training step on a rank of pipeline stage `pp_rank`; micro_batches: of one step on a rank.

    The peak is either in the last pipeline stage's loss, or where one layer's backward pass has computed again what it
    needs.
    """
    model, parallel = cfg.model, cfg.parallel
    tokens = micro_batch_tokens(cfg) // parallel.context_parallel_size
    layer = layer_activations(model, parallel, tokens=tokens, number_bytes=number_bytes)
    layers = model.num_layers // parallel.pipeline_model_parallel_size
    kept, again = _kept_and_again(layer, layers, cfg.train)
    head = 0
    if pp_rank == parallel.pipeline_model_parallel_size - 1:
        head = _head(model, parallel, tokens=tokens, number_bytes=number_bytes)
    flying = _micro_batches_in_flight(parallel, pp_rank, micro_batches)
    return int(kept * flying) + max(head, again + layer.mlp)


def layer_activations(
    model: ModelConfig, parallel: ParallelConfig, *, tokens: int, number_bytes: int
) -> LayerActivations:
    """Of one layer on one rank, for `tokens` tokens, before recomputation."""
    tp = parallel.tensor_model_parallel_size
    hidden = model.hidden_size // (tp if parallel.sequence_parallel else 1)
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    size = model.kv_channels or 0
    queries, keys = heads // tp * size, max(groups // tp, 1) * size
    row = number_bytes * tokens
    # Inputs of two norms and their outputs, of which the first is the layer's; q, k, v, and what attention gives
    attention = row * (3 * hidden + 2 * queries + 2 * keys + (queries + keys if model.qk_layernorm else 0))
    masks = 2 * tokens * hidden if model.hidden_dropout else 0
    return LayerActivations(
        input=row * hidden,
        attention=attention + masks,
        core=tokens * (heads // tp) * _core_bytes(model, number_bytes),
        mlp=_mlp(model, parallel, row),
    )


def _core_bytes(model: ModelConfig, number_bytes: int) -> int:
    """A query and head: a logarithm; where nothing is fused, softmax over all keys in FP32, what is multiplied with the
    values, and dropout's mask and result."""
    if model.backend is not Backend.local:
        return 4
    copies = (number_bytes if number_bytes < 4 else 0) + (1 + number_bytes if model.attention_dropout else 0)
    return model.seq_length * (4 + copies)


def _mlp(model: ModelConfig, parallel: ParallelConfig, row: int) -> int:
    """row: bytes of one number of every token. Experts see a token as often as it visits them, with a copy of it before
    and one behind."""
    products = 3 if model.swiglu else 2  # the first projection's result, and the activation's
    tp = parallel.tensor_model_parallel_size
    if model.num_experts is None:
        return row * products * (model.ffn_hidden_size or 0) // tp
    expert_tp = parallel.expert_tensor_parallel_size or tp
    visits = row * model.moe_router_topk * expert_tp // (tp if parallel.sequence_parallel else 1)
    return visits * (2 * model.hidden_size + products * (model.moe_ffn_hidden_size or 0) // expert_tp)


def _kept_and_again(layer: LayerActivations, layers: int, train: TrainConfig) -> tuple[int, int]:
    """What `layers` layers keep of one micro-batch, and what is computed again at once."""
    if train.recompute_granularity is RecomputeGranularity.none:
        return layers * layer.total, 0
    if train.recompute_granularity is RecomputeGranularity.selective:
        return layers * (layer.total - layer.core), layer.core
    together = min(train.recompute_num_layers, layers)
    if train.recompute_method is RecomputeMethod.uniform:
        return -(-layers // together) * layer.input, together * layer.total
    # block: each of the first so many alone; the others, whose backward pass is first, keep all
    rest = layers - together
    return together * layer.input + rest * layer.total, 0 if rest else layer.total


def _head(model: ModelConfig, parallel: ParallelConfig, *, tokens: int, number_bytes: int) -> int:
    """The last norm's input and output, logits and their gradient."""
    tp = parallel.tensor_model_parallel_size
    hidden = model.hidden_size // (tp if parallel.sequence_parallel else 1)
    columns = padded_vocab_size(model, tp) // tp if model.head is Head.language_model else 1
    return tokens * number_bytes * (2 * hidden + 2 * columns)


def _micro_batches_in_flight(parallel: ParallelConfig, pp_rank: int, micro_batches: int) -> float:
    """Forward passes that wait for their backward pass: 1F1B's, and with v chunks a rank the interleaved schedule's,
    which on the first stage is p + (p - 1) / v (Korthikanti et al. 2022, section 4.2.3)."""
    p, v = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if v == 1:
        return min(p - pp_rank, micro_batches)
    return min((2 * (p - pp_rank - 1) + (v - 1) * p + 1) / v, micro_batches)
