"""Llama 2, 3, 3.1 and later text models: LlamaForCausalLM. Also what many others save as."""

from scale_llm.config.model import Head
from scale_llm.models.huggingface import parts
from scale_llm.models.huggingface.table import Family

FAMILY = Family(
    model_type="llama",
    classes={
        Head.language_model: "LlamaForCausalLM",
        Head.reward: "LlamaForSequenceClassification",
        Head.value: "LlamaForTokenClassification",
    },
    fields=parts.FIELDS,
    ours=parts.OURS,
    theirs={**parts.THEIRS, "attention_bias": False, "mlp_bias": False},
    absent=parts.ABSENT,
    tensors=parts.EMBEDDING + parts.HEADS + parts.ATTENTION + parts.GATED_MLP,
)
