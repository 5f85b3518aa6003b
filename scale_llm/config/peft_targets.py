"""Which matrices of a model get adapters: `peft.target_modules` against the model's own. No torch."""

from scale_llm.config.model import ModelConfig

QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}


def parts_of(model: ModelConfig) -> dict[str, dict[str, str]]:
    """Megatron module -> Hugging Face's name of each of its parts -> our name of the part."""
    gated = {"gate_proj": "gate", "up_proj": "up"} if model.swiglu else {"up_proj": "up"}
    return {"linear_qkv": QKV, "linear_proj": {"o_proj": "o"}, "linear_fc1": gated, "linear_fc2": {"down_proj": "down"}}


def chosen_parts(model: ModelConfig, names: list[str]) -> dict[str, list[str]]:
    """Megatron module -> parts of it that get adapters, in the order of its rows; only modules with any."""
    found = {}
    for module, parts in parts_of(model).items():
        wanted = [ours for theirs, ours in parts.items() if module in names or theirs in names]
        if wanted:
            found[module] = wanted
    return found


def unmatched(model: ModelConfig, names: list[str]) -> list[str]:
    """Names that no module and no part has."""
    table = parts_of(model)
    known = {*table, *(name for parts in table.values() for name in parts)}
    return [name for name in names if name not in known]


def known_targets(model: ModelConfig) -> str:
    """For messages."""
    table = parts_of(model)
    return ", ".join([*table, *(name for parts in table.values() for name in parts)])
