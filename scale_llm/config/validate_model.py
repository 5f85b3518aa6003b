"""Whether the model's sizes fit each other and the tokenizer."""

from scale_llm.config.model import ModelConfig, PositionEmbedding
from scale_llm.config.resolve import tokenizer_vocab_size
from scale_llm.config.run import RunConfig
from scale_llm.config.train import RecomputeGranularity, RecomputeMethod


def model_problems(cfg: RunConfig) -> list[str]:
    """Sizes of the model that contradict each other."""
    return [
        *_attention(cfg.model),
        *_positions(cfg.model),
        *_moe(cfg.model),
        *_vocabulary(cfg),
        *_recompute(cfg),
    ]


def _attention(model: ModelConfig) -> list[str]:
    found = []
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    if model.hidden_size % heads and model.kv_channels == model.hidden_size // heads:
        found.append(
            f"model.hidden_size={model.hidden_size}: not divisible by model.num_attention_heads={heads}; "
            f"set model.hidden_size={-(-model.hidden_size // heads) * heads}, or model.kv_channels for heads of "
            "another size"
        )
    if heads % groups:
        found.append(
            f"model.num_attention_heads={heads}: not divisible by model.num_query_groups={groups}; "
            f"set model.num_query_groups to a divisor of {heads}"
        )
    share = model.rotary_percent if 0 < model.rotary_percent <= 1 else 0  # one that is none has a problem of its own
    rotary = int((model.kv_channels or 2) * share)
    if model.position_embedding_type is PositionEmbedding.rope and rotary % 2:
        found.append(
            f"model.kv_channels={model.kv_channels}: rotary embedding turns pairs, and {rotary} channels are odd; "
            "give an even head size"
        )
    return found


def _positions(model: ModelConfig) -> list[str]:
    longest = model.max_position_embeddings or model.seq_length
    if model.position_embedding_type is PositionEmbedding.learned_absolute and longest < model.seq_length:
        return [
            f"model.max_position_embeddings={longest}: shorter than model.seq_length={model.seq_length}; "
            f"set model.max_position_embeddings={model.seq_length}"
        ]
    return []


def _moe(model: ModelConfig) -> list[str]:
    if model.num_experts is None or model.moe_router_topk <= model.num_experts:
        return []
    return [
        f"model.moe_router_topk={model.moe_router_topk}: more than model.num_experts={model.num_experts}; "
        f"set model.moe_router_topk={model.num_experts} or less"
    ]


def _vocabulary(cfg: RunConfig) -> list[str]:
    tokens, rows = tokenizer_vocab_size(cfg.tokenizer), cfg.model.vocab_size
    if tokens is None:
        return [
            f"tokenizer.path={cfg.tokenizer.path}: no readable tokenizer.json; "
            "give a tokenizer.json, a directory that holds one, or null to train one on the data"
        ]
    if rows is not None and rows < tokens:
        return [
            f"model.vocab_size={rows}: smaller than the tokenizer's {tokens} tokens "
            f"({cfg.tokenizer.path or 'tokenizer.vocab_size'}); leave model.vocab_size=null to take the tokenizer's"
        ]
    return []


def _recompute(cfg: RunConfig) -> list[str]:
    train, layout = cfg.train, cfg.parallel
    if train.recompute_granularity is not RecomputeGranularity.full:
        return []
    chunks = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size or 1)
    per_chunk = cfg.model.num_layers // chunks
    if train.recompute_method is RecomputeMethod.uniform and train.recompute_num_layers > max(per_chunk, 1):
        return [
            f"train.recompute_num_layers={train.recompute_num_layers}: a model chunk has {per_chunk} layers; "
            f"set train.recompute_num_layers={max(per_chunk, 1)} or less"
        ]
    return []
