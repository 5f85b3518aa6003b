"""The parts that Llama-like families share."""

from scale_llm.models.huggingface.table import Form, Part, Tensor, scores, untied, values

_LAYER = "model.layers.{layer}."
_KEY = "decoder.layers."

EMBEDDING = (
    Tensor("embedding.word_embeddings.weight", (Part("model.embed_tokens.weight", "v h"),), Form.vocabulary),
    Tensor("decoder.final_layernorm.weight", (Part("model.norm.weight", "h"),)),
)

HEADS = (
    Tensor("output_layer.weight", (Part("lm_head.weight", "v h"),), Form.vocabulary, when=untied),
    Tensor("score.weight", (Part("score.weight", "1 h"),), when=scores),
    Tensor("score.bias", (Part("score.bias", "1"),), when=values),
)

ATTENTION = (
    Tensor(_KEY + "self_attention.linear_qkv.layer_norm_weight", (Part(_LAYER + "input_layernorm.weight", "h"),)),
    Tensor(
        _KEY + "self_attention.linear_qkv.weight",
        (
            Part(_LAYER + "self_attn.q_proj.weight", "q h"),
            Part(_LAYER + "self_attn.k_proj.weight", "k h"),
            Part(_LAYER + "self_attn.v_proj.weight", "k h"),
        ),
        Form.qkv,
    ),
    Tensor(_KEY + "self_attention.linear_proj.weight", (Part(_LAYER + "self_attn.o_proj.weight", "h q"),)),
)

QKV_BIAS = (
    Tensor(
        _KEY + "self_attention.linear_qkv.bias",
        (
            Part(_LAYER + "self_attn.q_proj.bias", "q"),
            Part(_LAYER + "self_attn.k_proj.bias", "k"),
            Part(_LAYER + "self_attn.v_proj.bias", "k"),
        ),
        Form.qkv,
    ),
)

QK_NORM = (
    Tensor(_KEY + "self_attention.q_layernorm.weight", (Part(_LAYER + "self_attn.q_norm.weight", "d"),)),
    Tensor(_KEY + "self_attention.k_layernorm.weight", (Part(_LAYER + "self_attn.k_norm.weight", "d"),)),
)

GATED_MLP = (
    Tensor(_KEY + "mlp.linear_fc1.layer_norm_weight", (Part(_LAYER + "post_attention_layernorm.weight", "h"),)),
    Tensor(
        _KEY + "mlp.linear_fc1.weight",
        (Part(_LAYER + "mlp.gate_proj.weight", "f h"), Part(_LAYER + "mlp.up_proj.weight", "f h")),
        Form.gate_up,
    ),
    Tensor(_KEY + "mlp.linear_fc2.weight", (Part(_LAYER + "mlp.down_proj.weight", "h f"),)),
)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """A router and its gated experts. block: the module below the layer; gate, up, down: an expert's matrices."""
    expert = _LAYER + block + ".experts.{expert}."
    return (
        Tensor(_KEY + "pre_mlp_layernorm.weight", (Part(_LAYER + "post_attention_layernorm.weight", "h"),)),
        Tensor(_KEY + "mlp.router.weight", (Part(_LAYER + block + ".gate.weight", "e h"),)),
        Tensor(
            _KEY + "mlp.experts.experts.linear_fc1.weight",
            (Part(f"{expert}{gate}.weight", "x h"), Part(f"{expert}{up}.weight", "x h")),
            Form.gate_up,
        ),
        Tensor(_KEY + "mlp.experts.experts.linear_fc2.weight", (Part(f"{expert}{down}.weight", "h x"),)),
    )


FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
    "init_method_std": "initializer_range",
}

OURS = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}

THEIRS = {"hidden_act": "silu"}

ABSENT = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02}
