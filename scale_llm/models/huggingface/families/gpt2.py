"""GPT-2: LayerNorm, learned positions, tanh GELU, biases everywhere, tied embeddings; weights kept as [in, out]."""

from scale_llm.config.model import Head
from scale_llm.models.huggingface.table import Family, Form, Part, Tensor, rewards, untied, values

_LAYER = "transformer.h.{layer}."
_KEY = "decoder.layers."


def _linear(key: str, name: str, rows: str, columns: str) -> tuple[Tensor, ...]:
    """A Conv1D's weight [rows, columns] and bias."""
    return (
        Tensor(f"{_KEY}{key}.weight", (Part(f"{_LAYER}{name}.weight", f"{rows} {columns}"),), Form.transposed),
        Tensor(f"{_KEY}{key}.bias", (Part(f"{_LAYER}{name}.bias", columns),)),
    )


def _norm(key: str, name: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(f"{key}{kind}", (Part(f"{name}.{kind}", "h"),)) for kind in ("weight", "bias"))


FAMILY = Family(
    model_type="gpt2",
    classes={
        Head.language_model: "GPT2LMHeadModel",
        Head.reward: "GPT2ForSequenceClassification",
        Head.value: "GPT2ForTokenClassification",
    },
    fields={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "ffn_hidden_size": "n_inner",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "vocab_size": "vocab_size",
        "norm_epsilon": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
        "hidden_dropout": "resid_pdrop",
        "init_method_std": "initializer_range",
    },
    ours={
        "normalization": "LayerNorm",
        "swiglu": False,
        "openai_gelu": True,
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "qk_layernorm": False,
    },
    theirs={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    absent={
        "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    base="transformer.",
    ignored=("attn.bias", "attn.masked_bias"),
    tensors=(
        Tensor("embedding.word_embeddings.weight", (Part("transformer.wte.weight", "v h"),), Form.vocabulary),
        Tensor("embedding.position_embeddings.weight", (Part("transformer.wpe.weight", "p h"),)),
        Tensor("output_layer.weight", (Part("lm_head.weight", "v h"),), Form.vocabulary, when=untied),
        Tensor("score.weight", (Part("score.weight", "1 h"),), when=rewards),
        Tensor("score.weight", (Part("classifier.weight", "1 h"),), when=values),
        Tensor("score.bias", (Part("classifier.bias", "1"),), when=values),
        *_norm(_KEY + "self_attention.linear_qkv.layer_norm_", _LAYER + "ln_1"),
        Tensor(
            _KEY + "self_attention.linear_qkv.weight", (Part(_LAYER + "attn.c_attn.weight", "h 3h"),), Form.qkv_thirds
        ),
        Tensor(_KEY + "self_attention.linear_qkv.bias", (Part(_LAYER + "attn.c_attn.bias", "3h"),), Form.qkv_thirds),
        *_linear("self_attention.linear_proj", "attn.c_proj", "h", "h"),
        *_norm(_KEY + "mlp.linear_fc1.layer_norm_", _LAYER + "ln_2"),
        *_linear("mlp.linear_fc1", "mlp.c_fc", "h", "f"),
        *_linear("mlp.linear_fc2", "mlp.c_proj", "f", "h"),
        *_norm("decoder.final_layernorm.", "transformer.ln_f"),
    ),
)  # fmt: skip
