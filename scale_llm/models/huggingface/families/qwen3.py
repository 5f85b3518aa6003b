"""Qwen3: norms on queries and keys, no biases, a head size of its own."""

from scale_llm.config.model import Head
from scale_llm.models.huggingface import parts
from scale_llm.models.huggingface.table import Family

FAMILY = Family(
    model_type="qwen3",
    classes={
        Head.language_model: "Qwen3ForCausalLM",
        Head.reward: "Qwen3ForSequenceClassification",
        Head.value: "Qwen3ForTokenClassification",
    },
    fields=parts.FIELDS,
    ours={**parts.OURS, "qk_layernorm": True},
    theirs={**parts.THEIRS, "use_sliding_window": False, "attention_bias": False},
    absent={**parts.ABSENT, "head_dim": 128, "num_key_value_heads": 32},
    tensors=parts.EMBEDDING + parts.HEADS + parts.ATTENTION + parts.QK_NORM + parts.GATED_MLP,
)
