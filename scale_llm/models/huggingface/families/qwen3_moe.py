"""Qwen3-MoE: Qwen3's attention with experts in every layer."""

from scale_llm.config.model import Head
from scale_llm.models.huggingface import parts
from scale_llm.models.huggingface.table import Family

FAMILY = Family(
    model_type="qwen3_moe",
    classes={
        Head.language_model: "Qwen3MoeForCausalLM",
        Head.reward: "Qwen3MoeForSequenceClassification",
        Head.value: "Qwen3MoeForTokenClassification",
    },
    fields={
        **parts.FIELDS,
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "num_experts": "num_experts",
        "moe_router_topk": "num_experts_per_tok",
    },
    ours={**parts.OURS, "qk_layernorm": True},
    theirs={**parts.THEIRS, "use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1,
            "mlp_only_layers": []},
    absent={**parts.ABSENT, "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "norm_topk_prob": False},
    also={"num_experts": "num_local_experts"},
    tensors=parts.EMBEDDING
    + parts.HEADS
    + parts.ATTENTION
    + parts.QK_NORM
    + parts.experts("mlp", "gate_proj", "up_proj", "down_proj"),
)  # fmt: skip
