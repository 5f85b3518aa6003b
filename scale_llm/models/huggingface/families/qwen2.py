"""Qwen2 and Qwen2.5: biases on queries, keys and values; small models tie their embeddings."""

from scale_llm.config.model import Head
from scale_llm.models.huggingface import parts
from scale_llm.models.huggingface.table import Family

FAMILY = Family(
    model_type="qwen2",
    classes={
        Head.language_model: "Qwen2ForCausalLM",
        Head.reward: "Qwen2ForSequenceClassification",
        Head.value: "Qwen2ForTokenClassification",
    },
    fields={name: key for name, key in parts.FIELDS.items() if name != "kv_channels"},
    ours={**parts.OURS, "add_qkv_bias": True},
    theirs={**parts.THEIRS, "use_sliding_window": False},
    absent={**parts.ABSENT, "num_key_value_heads": 32},
    tensors=parts.EMBEDDING + parts.HEADS + parts.ATTENTION + parts.QKV_BIAS + parts.GATED_MLP,
)
