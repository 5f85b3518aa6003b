"""Mixtral: Mistral with experts; a token's weights are a softmax over the logits of its chosen experts."""

from scale_llm.config.model import Head
from scale_llm.models.huggingface import parts
from scale_llm.models.huggingface.table import Family

FAMILY = Family(
    model_type="mixtral",
    classes={
        Head.language_model: "MixtralForCausalLM",
        Head.reward: "MixtralForSequenceClassification",
        Head.value: "MixtralForTokenClassification",
    },
    fields={
        **parts.FIELDS,
        "moe_ffn_hidden_size": "intermediate_size",
        "num_experts": "num_local_experts",
        "moe_router_topk": "num_experts_per_tok",
        "window_size": "sliding_window",
    },
    ours={**parts.OURS, "moe_router_pre_softmax": False},
    theirs=parts.THEIRS,
    absent={**parts.ABSENT, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "num_key_value_heads": 8,
            "num_local_experts": 8, "num_experts_per_tok": 2},
    tensors=parts.EMBEDDING + parts.HEADS + parts.ATTENTION + parts.experts("block_sparse_moe", "w1", "w3", "w2"),
)  # fmt: skip
