"""Random models of every supported family, made by transformers itself from its real configuration classes."""

import functools
import inspect
from pathlib import Path
from typing import Any

import torch

SIZES = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 300, "max_position_embeddings": 128}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 300, "n_positions": 128, "attn_pdrop": 0.0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
ONE_LABEL = {"num_labels": 1, "pad_token_id": 0}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "num_key_value_heads": 8}),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "rope_parameters": LLAMA3_ROPE}),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM",
                   {**SIZES, "tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LINEAR_ROPE}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, "sliding_window": 24}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, "head_dim": 16}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**SIZES, **EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM",
                  {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "moe_intermediate_size": 48,
                   "norm_topk_prob": False}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
}  # fmt: skip
"""Name -> transformers' configuration class, model class and arguments."""

HEADS = {
    "llama_reward": ("LlamaConfig", "LlamaForSequenceClassification", {**SIZES, **ONE_LABEL}),
    "qwen2_reward": ("Qwen2Config", "Qwen2ForSequenceClassification", {**SIZES, **ONE_LABEL}),
    "llama_value": ("LlamaConfig", "LlamaForTokenClassification", {**SIZES, **ONE_LABEL}),
    "gpt2_reward": ("GPT2Config", "GPT2ForSequenceClassification", {**GPT2, **ONE_LABEL}),
    "gpt2_value": ("GPT2Config", "GPT2ForTokenClassification", {**GPT2, **ONE_LABEL, "classifier_dropout": 0.0}),
}  # fmt: skip

MOE = ("mixtral", "qwen3_moe")


def build(name: str):
    """The transformers model, FP32. Weights are large enough that every mistake shows; none is 0 or 1."""
    import transformers

    config_class, model_class, arguments = {**FAMILIES, **HEADS}[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(name: str, directory: Path, **options) -> Path:
    """The model with a tokenizer, as save_pretrained leaves it."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    build(name).save_pretrained(directory, **options)
    tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return directory


@functools.cache
def tokenizer():
    """Byte-level BPE of 280 tokens, on the source of this machine's own library."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([text()], trainer)
    return made


def text() -> str:
    """Real text: the source of a module of the standard library."""
    return inspect.getsource(inspect)


def tokens(batch: int, length: int, start: int = 0) -> torch.Tensor:
    """Token ids [batch, length] of that text."""
    ids = tokenizer().encode(text()).ids
    begin = start * batch * length
    return torch.tensor(ids[begin : begin + batch * length]).view(batch, length)
