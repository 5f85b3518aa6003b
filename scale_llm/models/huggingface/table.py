"""What a family of Hugging Face models is to us: a table of tensors and a table of config keys. No torch here: the
command line reads config.json with it.

Sizes in shapes: h hidden, v vocabulary, p positions, q query heads * head size, k key/value groups * head size, d head
size, t = q + 2 k, f feed-forward, x feed-forward of one expert, e experts, 3h three times h; a number is itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from scale_llm.config.model import Head, ModelConfig


class Form(Enum):
    """How a Megatron tensor is made of Hugging Face's. All are exact both ways."""

    same = "same"
    vocabulary = "vocabulary"
    """The same rows, then zeros up to Megatron's padded vocabulary."""
    qkv = "qkv"
    """Queries, keys, values -> group by group, its query heads, its key head, its value head."""
    gate_up = "gate_up"
    """Gate rows above up rows."""
    transposed = "transposed"
    """[in, out], as GPT-2's Conv1D keeps weights, -> [out, in]."""
    qkv_thirds = "qkv_thirds"
    """GPT-2: queries, keys and values as thirds of the last dimension, transposed where there are two."""


@dataclass(frozen=True, slots=True)
class Part:
    """One Hugging Face tensor. name: with {layer} and {expert} where there are many; shape: names of sizes."""

    name: str
    shape: str

    def sizes(self, model: ModelConfig) -> tuple[int, ...]:
        table = sizes_of(model)
        return tuple(int(word) if word.isdigit() else table[word] for word in self.shape.split())


@dataclass(frozen=True, slots=True)
class Tensor:
    """One Megatron tensor by its name in a checkpoint, and what makes it.

    when: whether a model has it; None: every model of the family.
    """

    key: str
    parts: tuple[Part, ...]
    form: Form = Form.same
    when: Callable[[ModelConfig], bool] | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.parts[0].name

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.parts[0].name

    def applies(self, model: ModelConfig) -> bool:
        return self.when is None or self.when(model)

    def indices(self, model: ModelConfig) -> list[tuple[int, ...]]:
        """Positions along the leading axes that Megatron stacks: (), (layer,) or (layer, expert)."""
        layers = range(model.num_layers)
        if self.per_expert:
            return [(layer, expert) for layer in layers for expert in range(model.num_experts or 0)]
        return [(layer,) for layer in layers] if self.per_layer else [()]

    def names(self, index: tuple[int, ...]) -> list[str]:
        """Hugging Face's names of the parts at one index."""
        places = dict(zip(("layer", "expert"), index, strict=False))
        return [part.name.format(**places) for part in self.parts]

    def leading(self, model: ModelConfig) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        if self.per_expert:
            return (model.num_layers, model.num_experts or 0)
        return (model.num_layers,) if self.per_layer else ()

    def shape(self, model: ModelConfig, padded_vocabulary: int) -> tuple[int, ...]:
        """Megatron's shape at one index."""
        shapes = [part.sizes(model) for part in self.parts]
        if self.form is Form.vocabulary:
            return (padded_vocabulary, *shapes[0][1:])
        if self.form in (Form.transposed, Form.qkv_thirds):
            return tuple(reversed(shapes[0]))
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model_type of transformers.

    classes: Hugging Face's class for each head.
    fields: field of ModelConfig -> key of config.json.
    ours: values that ModelConfig has for every model of the family.
    theirs: values that config.json must have where the key is there: what is not supported otherwise.
    absent: what transformers takes where a key of config.json is missing.
    also: another name that some versions of transformers give to a key.
    base: prefix of all but the head; some checkpoints were saved without it.
    ignored: ends of names that hold nothing learnt.
    """

    model_type: str
    classes: dict[Head, str]
    fields: dict[str, str]
    tensors: tuple[Tensor, ...]
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, Any] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    base: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def tensors_of(self, model: ModelConfig) -> list[Tensor]:
        """The tensors that a model of this shape has, its head included."""
        return [tensor for tensor in self.tensors if tensor.applies(model)]


def untied(model: ModelConfig) -> bool:
    """An output table of its own."""
    return model.head is Head.language_model and model.untie_embeddings_and_output_weights


def rewards(model: ModelConfig) -> bool:
    return model.head is Head.reward


def values(model: ModelConfig) -> bool:
    return model.head is Head.value


def scores(model: ModelConfig) -> bool:
    """One number for a token in place of logits."""
    return rewards(model) or values(model)


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """The sizes that shapes name."""
    heads, d = model.num_attention_heads, model.kv_channels or 0
    q, k = heads * d, (model.num_query_groups or heads) * d
    return {
        "h": model.hidden_size, "v": model.vocab_size or 0, "q": q, "k": k, "t": q + 2 * k, "d": d,
        "p": model.max_position_embeddings or model.seq_length, "f": model.ffn_hidden_size or 0,
        "x": model.moe_ffn_hidden_size or 0, "e": model.num_experts or 0, "3h": 3 * model.hidden_size,
    }  # fmt: skip
