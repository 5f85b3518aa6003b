"""Adapters in the format of Hugging Face's peft: names of tensors and adapter_config.json. No torch.

Adapters stand beside layers, so a family's table of tensors says where: each part of a Megatron layer is the Hugging
Face module whose weight it is made of.
"""

import re
from dataclasses import dataclass
from typing import Any

from scale_llm.config.errors import UserError
from scale_llm.config.model import ModelConfig
from scale_llm.config.peft import PeftConfig, PeftMethod
from scale_llm.config.peft_targets import chosen_parts, parts_of
from scale_llm.models.huggingface.table import Family, Form, Tensor

PREFIX = "base_model.model."
PROMPT = "prompt_embeddings"
ENDS = {"into": "lora_A.weight", "out": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
OURS = {"into": "linear_in.weight", "out": "linear_out.weight", "magnitude": "magnitude"}


@dataclass(frozen=True, slots=True)
class Place:
    """One part of a Megatron layer in the table: `layer` as in decoder.layers.self_attention.linear_qkv, `part` as in
    its adapter's names."""

    layer: str
    part: str
    tensor: Tensor
    position: int

    def ours(self, what: str) -> str:
        """Name in a checkpoint of `into` (A), `out` (B) or `magnitude`."""
        return f"{self.layer}.adapter.{self.part}.{OURS[what]}"

    def theirs(self, what: str, index: tuple[int, ...]) -> str:
        """peft's name of the same at a layer (and expert)."""
        return f"{PREFIX}{self.module(index)}.{ENDS[what]}"

    def module(self, index: tuple[int, ...]) -> str:
        """The Hugging Face module that the part is."""
        return self.tensor.names(index)[self.position].removesuffix(".weight")


def places(family: Family, model: ModelConfig) -> list[Place]:
    """Every part of every layer that adapters can stand beside.

    Raises:
        UserError: the family keeps several parts in one module (GPT-2), which has one A for all of them.
    """
    found = []
    for tensor in family.tensors_of(model):
        layer, _, name = tensor.key.rpartition(".")
        parts = parts_of(model).get(layer.rpartition(".")[2])
        if name != "weight" or parts is None:
            continue
        if tensor.form in (Form.qkv_thirds, Form.transposed):
            raise UserError(
                f"{family.model_type}: keeps queries, keys and values in one module, so that peft has one matrix A for "
                "what has three here; merge adapters into the model instead"
            )
        found += [Place(layer, part, tensor, i) for i, part in enumerate(parts.values())]
    return found


def chosen(family: Family, model: ModelConfig, peft: PeftConfig) -> list[Place]:
    """The places that have adapters."""
    wanted = chosen_parts(model, peft.target_modules)
    return [place for place in places(family, model) if place.part in wanted.get(place.layer.rpartition(".")[2], [])]


def adapter_config(family: Family, model: ModelConfig, peft: PeftConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json."""
    common = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    if peft.method is PeftMethod.prompt_tuning:
        return {
            **common, "peft_type": "PROMPT_TUNING", "num_virtual_tokens": peft.num_virtual_tokens,
            "token_dim": model.hidden_size, "num_transformer_submodules": 1, "num_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads, "prompt_tuning_init": "RANDOM",
        }  # fmt: skip
    modules = {place.module((0,) * len(place.tensor.leading(model))) for place in chosen(family, model, peft)}
    return {
        **common, "peft_type": "LORA", "r": peft.rank, "lora_alpha": peft.alpha, "lora_dropout": peft.dropout,
        "use_dora": peft.method is PeftMethod.dora, "use_rslora": peft.use_rslora, "bias": "none",
        "fan_in_fan_out": False, "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }  # fmt: skip


def read_adapter_config(config: dict[str, Any], source: str) -> PeftConfig:
    """The peft group that an adapter_config.json describes; which parts have matrices its tensors say.

    Raises:
        UserError: with every key that asks for something that is not supported.
    """
    kind = config.get("peft_type")
    if kind == "PROMPT_TUNING":
        return PeftConfig(method=PeftMethod.prompt_tuning, num_virtual_tokens=int(config["num_virtual_tokens"]))
    if kind != "LORA":
        raise UserError(f"{source}: peft_type={kind}: only LORA (with DoRA) and PROMPT_TUNING are supported")
    plain: dict[str, Any] = {"bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
             "modules_to_save": None, "fan_in_fan_out": False, "lora_bias": False}  # fmt: skip
    problems = [
        f"{source}: {key}={config[key]}: not supported; it must be {value}"
        for key, value in plain.items()
        if config.get(key) not in (value, None)
    ]
    if problems:
        raise UserError(problems)
    return PeftConfig(
        method=PeftMethod.dora if config.get("use_dora") else PeftMethod.lora,
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        use_rslora=bool(config.get("use_rslora", False)),
    )


def target_names(model: ModelConfig, found: set[tuple[str, str]]) -> list[str]:
    """`peft.target_modules` for the (module, part) pairs that have matrices: Hugging Face's names of the parts."""
    table = parts_of(model)
    return [theirs for module, parts in table.items() for theirs, ours in parts.items() if (module, ours) in found]


def plain_name(name: str) -> str:
    """A peft name without the adapter's own (`default`), which some versions leave in."""
    return re.sub(r"\.(lora_[AB])\.(?:\w+\.)?weight$", r".\1.weight", re.sub(r"(_magnitude_vector)\..*$", r"\1", name))
