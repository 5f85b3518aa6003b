"""Mistral: Llama's tensors, and in its first version a window of attention."""

from scale_llm.config.model import Head
from scale_llm.models.huggingface import parts
from scale_llm.models.huggingface.table import Family

FAMILY = Family(
    model_type="mistral",
    classes={
        Head.language_model: "MistralForCausalLM",
        Head.reward: "MistralForSequenceClassification",
        Head.value: "MistralForTokenClassification",
    },
    fields={**parts.FIELDS, "window_size": "sliding_window"},
    ours=parts.OURS,
    theirs=parts.THEIRS,
    absent={**parts.ABSENT, "sliding_window": 4096, "num_key_value_heads": 8},
    tensors=parts.EMBEDDING + parts.HEADS + parts.ATTENTION + parts.GATED_MLP,
)
