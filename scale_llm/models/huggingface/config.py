"""config.json of transformers -> ModelConfig and back. No torch."""

import copy
from enum import Enum
from typing import Any

from scale_llm.config.errors import UserError
from scale_llm.config.model import Head, ModelConfig, Normalization, PositionEmbedding, RopeScaling
from scale_llm.models.huggingface.families import (
    gpt2,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from scale_llm.models.huggingface.table import Family

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in (llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, gpt2)
)

_ENUMS: dict[str, type[Enum]] = {"normalization": Normalization, "position_embedding_type": PositionEmbedding}

_LLAMA3 = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_position_embeddings": "original_max_position_embeddings",
}

LONGEST = 4096
"""Tokens per sample that training starts with, where the model could take more."""

_SHARED = ("swiglu", "openai_gelu", "moe_router_pre_softmax")
"""Fields that a family may leave out of `ours`: ModelConfig's default is then the only value."""


def family_of(config: dict[str, Any], source: str) -> tuple[Family, Head]:
    """The family and head that a config.json names. source: where it lies, for the error.

    Raises:
        UserError: the class is none of those supported.
    """
    names = config.get("architectures") or []
    for family in FAMILIES:
        for head, name in family.classes.items():
            if name in names:
                return family, head
        if not names and config.get("model_type") == family.model_type:
            return family, Head.language_model
    known = ", ".join(family.classes[Head.language_model] for family in FAMILIES)
    raise UserError(
        f"{source}: architecture {names[0] if names else config.get('model_type')} is not supported; supported are "
        f"{known}, and of each family the ForSequenceClassification and ForTokenClassification class with one label"
    )


def read_model(config: dict[str, Any], source: str) -> ModelConfig:
    """The model group of a config.json.

    Raises:
        UserError: what of it is not supported, all at once.
    """
    family, head = family_of(config, source)
    problems = _unsupported(config, family, head, source)
    found: dict[str, Any] = {"head": head, "architecture": family.classes[head]}
    for name, value in family.ours.items():
        found[name] = _ENUMS[name](value) if name in _ENUMS else value
    for name, key in family.fields.items():
        value = config.get(_key(family, key, config), family.absent.get(key))
        if value is not None:
            found[name] = value
    if config.get("use_sliding_window") is False:
        found.pop("window_size", None)
    if "norm_topk_prob" in {**family.absent, **config}:
        found["moe_router_pre_softmax"] = not config.get("norm_topk_prob", family.absent.get("norm_topk_prob"))
    tied = config.get("tie_word_embeddings", family.absent.get("tie_word_embeddings", False))
    found["untie_embeddings_and_output_weights"] = not tied
    if family.ours.get("position_embedding_type") == "rope":
        scaling, wrong = _read_rope(config, family, source)
        found |= scaling
        problems += wrong
    problems += [f"{source}: {key} is missing" for key in _missing(found, family)]
    problems += [
        f"{source}: {key}={found[name]!r} must be a positive number"
        for name, key in family.fields.items()
        if name in found and name not in MAY_BE_ZERO and not (_is_number(found[name]) and found[name] > 0)
    ]
    if problems:
        raise UserError(problems)
    found["name"] = family.model_type
    model = ModelConfig(**found)
    return _complete(model)


def _key(family: Family, key: str, config: dict[str, Any]) -> str:
    """The name that this config.json has for a key."""
    other = family.also.get(key)
    return other if other is not None and key not in config and other in config else key


MAY_BE_ZERO = ("hidden_dropout", "attention_dropout")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _complete(model: ModelConfig) -> ModelConfig:
    """Sizes that transformers derives where they are not given."""
    model.num_query_groups = model.num_query_groups or model.num_attention_heads
    model.kv_channels = model.kv_channels or model.hidden_size // model.num_attention_heads
    model.ffn_hidden_size = model.ffn_hidden_size or 4 * model.hidden_size
    model.seq_length = min(model.max_position_embeddings or LONGEST, LONGEST)
    return model


def _missing(found: dict[str, Any], family: Family) -> list[str]:
    needed = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
    return [family.fields[name] for name in needed if name not in found]


def _unsupported(config: dict[str, Any], family: Family, head: Head, source: str) -> list[str]:
    problems = [
        f"{source}: {key}={config[key]} is not supported for {family.model_type}; supported is {key}={value}"
        for key, value in family.theirs.items()
        if config.get(key) is not None and config[key] != value
    ]
    labels = config.get("num_labels") or len(config.get("id2label") or {0: ""})
    if head is not Head.language_model and labels != 1:
        problems.append(f"{source}: num_labels={labels}; a reward or value head has one label")
    return problems


def _read_rope(config: dict[str, Any], family: Family, source: str) -> tuple[dict[str, Any], list[str]]:
    """Both spellings: rope_theta beside rope_scaling, and rope_parameters of transformers 5."""
    given = [config.get("rope_scaling") or {}, config.get("rope_parameters") or {}]
    if not all(isinstance(part, dict) for part in given):
        return {}, [f"{source}: rope_scaling and rope_parameters must be objects"]
    rope = given[0] | given[1]
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    needed = {"linear": ["factor"], "llama3": list(_LLAMA3.values())}.get(kind, [])
    if absent := [key for key in needed if not isinstance(rope.get(key), int | float)]:
        return {}, [f"{source}: rope scaling lacks the numbers {', '.join(absent)}"]
    base = float(rope.get("rope_theta") or config.get("rope_theta") or family.absent["rope_theta"])
    found: dict[str, Any] = {"rotary_base": int(base)}
    problems = []
    if int(base) != base:
        problems.append(f"{source}: rope_theta={base} is not a whole number, which is not supported")
    if kind == "linear":
        found |= {"rope_scaling": RopeScaling.linear, "rope_scaling_factor": rope["factor"]}
    elif kind == "llama3":
        found["rope_scaling"] = RopeScaling.llama3
        found |= {name: rope[key] for name, key in _LLAMA3.items() if key in rope}
    elif kind != "default":
        problems.append(f"{source}: rope_type={kind} is not supported; supported are default, linear and llama3")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append(f"{source}: partial_rotary_factor other than 1 is not supported")
    return found, problems


def export_family(model: ModelConfig, architecture: str | None = None) -> Family:
    """The family that a model can be written as: the class asked for, or the model's own, or the first that fits.

    Raises:
        UserError: none has this shape, or the one asked for has not.
    """
    wanted = architecture or model.architecture
    heads = {name: head for family in FAMILIES for head, name in family.classes.items()}
    if wanted in heads and heads[wanted] is not model.head:
        raise UserError(f"architecture {wanted}: has a {heads[wanted].value} head, the model a {model.head.value} head")
    candidates = [f for f in FAMILIES if wanted is None or wanted in f.classes.values() or wanted == f.model_type]
    if not candidates:
        known = ", ".join(name for family in FAMILIES for name in family.classes.values())
        raise UserError(f"architecture {wanted}: not known; one of {known}")
    reasons = {family.model_type: _unlike(model, family) for family in candidates}
    for family in candidates:
        if not reasons[family.model_type]:
            return family
    raise UserError([f"the model cannot be written as {name}: {', '.join(found)}" for name, found in reasons.items()])


def _unlike(model: ModelConfig, family: Family) -> list[str]:
    """Fields of the model that the family has not."""
    expected = {name: _ENUMS[name](value) if name in _ENUMS else value for name, value in family.ours.items()}
    default = ModelConfig()
    expected |= {name: getattr(default, name) for name in _SHARED if name not in expected}
    if "norm_topk_prob" in family.absent:
        expected.pop("moe_router_pre_softmax")
    if "num_experts" not in family.fields:
        expected["num_experts"] = None
    if "window_size" not in family.fields:
        expected["window_size"] = None
    if family.base == "transformer.":
        expected["kv_channels"] = model.hidden_size // model.num_attention_heads
        expected["num_query_groups"] = model.num_attention_heads
    elif "kv_channels" not in family.fields:
        expected["kv_channels"] = model.hidden_size // model.num_attention_heads
    wrong = [
        f"model.{name}={_plain(getattr(model, name))} where it has {_plain(value)}"
        for name, value in expected.items()
        if getattr(model, name) != value
    ]
    if "num_experts" in family.fields and model.num_experts is None:
        wrong.append("model.num_experts is not set")
    return wrong


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def write_config(model: ModelConfig, family: Family, dtype: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model. base: that of the model it came from, whose other keys are kept."""
    config = _kept(base or {}, model, family)
    config |= {"architectures": [family.classes[model.head]], "model_type": family.model_type}
    for name, key in family.fields.items():
        config[_key(family, key, config)] = getattr(model, name)
    config |= {key: value for key, value in family.theirs.items() if key in config or key.endswith(("act", "function"))}
    config["tie_word_embeddings"] = not model.untie_embeddings_and_output_weights
    if "norm_topk_prob" in family.absent:
        config["norm_topk_prob"] = not model.moe_router_pre_softmax
    if model.position_embedding_type is PositionEmbedding.rope:
        _write_rope(config, model)
    if family.base == "transformer.":
        config["embd_pdrop"] = model.hidden_dropout
    if model.head is not Head.language_model:
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    config.setdefault("use_cache", True)
    return config


def _kept(base: dict[str, Any], model: ModelConfig, family: Family) -> dict[str, Any]:
    """What to keep of the configuration it came from: everything of the same shape, else the special tokens alone."""
    shape = ("num_layers", "hidden_size", "num_attention_heads")
    same = base.get("model_type") == family.model_type and all(
        base.get(family.fields[name]) == getattr(model, name) for name in shape
    )
    if not same:
        return {key: value for key, value in base.items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kept = copy.deepcopy(base)
    kept.pop("quantization_config", None)
    return kept


def _write_rope(config: dict[str, Any], model: ModelConfig) -> None:
    """In the spelling that the configuration has, else in the older one, which every version of transformers reads."""
    scaling: dict[str, Any] = {}
    if model.rope_scaling is not RopeScaling.none:
        scaling["rope_type"] = model.rope_scaling.value
        names = _LLAMA3 if model.rope_scaling is RopeScaling.llama3 else {"rope_scaling_factor": "factor"}
        scaling |= {key: getattr(model, name) for name, key in names.items()}
    if "rope_parameters" in config:
        config["rope_parameters"] = {
            "rope_theta": float(model.rotary_base), "rope_type": "default", **scaling
        }  # fmt: skip
    else:
        config["rope_theta"] = float(model.rotary_base)
        config["rope_scaling"] = scaling or None
