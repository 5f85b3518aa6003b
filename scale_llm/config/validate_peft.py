"""Whether adapters fit the model and the run."""

import importlib.util
from typing import Any

from omegaconf import OmegaConf

from scale_llm.config.model import Backend
from scale_llm.config.peft import BaseQuantization, PeftMethod
from scale_llm.config.peft_targets import chosen_parts, known_targets, unmatched
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import PretrainConfig


def peft_problems(cfg: RunConfig) -> list[str]:
    """Problems of the peft group."""
    peft = cfg.peft
    if peft.method is PeftMethod.none:
        return []
    found = []
    if isinstance(cfg.stage, PretrainConfig):
        found.append(
            f"peft.method={peft.method.value}: pretraining trains all weights; set peft=none, or stage=sft with a "
            "checkpoint.load"
        )
    return found + (_prompt(cfg) if peft.method is PeftMethod.prompt_tuning else _low_rank(cfg))


OF_METHOD = {
    PeftMethod.none: (),
    PeftMethod.lora: ("rank", "alpha", "use_rslora", "target_modules"),
    PeftMethod.dora: ("rank", "alpha", "use_rslora", "target_modules"),
    PeftMethod.prompt_tuning: ("num_virtual_tokens",),
}
"""Keys that decide what adapters compute, which a checkpoint of them fixes."""


def other_adapters(cfg: RunConfig, former: dict[str, Any], what: str, remedy: str) -> list[str]:
    """The problem of adapters that are not those of a former configuration (plain dictionaries)."""
    before = former.get("peft") or {}
    now: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(cfg.peft), enum_to_str=True)  # type: ignore[assignment]
    if now["method"] != before.get("method", "none"):
        keys: tuple[str, ...] = ("method",)
    else:
        keys = OF_METHOD[cfg.peft.method]
    different = [
        f"peft.{key}={now[key]} (there {before.get(key, 'none')})"
        for key in keys
        if (key in before or key == "method") and not _alike(cfg, key, now[key], before.get(key))
    ]
    return [f"{what}: {', '.join(different)}; {remedy}"] if different else []


def _alike(cfg: RunConfig, key: str, now: Any, before: Any) -> bool:
    if key != "target_modules":
        return now == before
    return chosen_parts(cfg.model, now) == chosen_parts(cfg.model, before or [])


def _prompt(cfg: RunConfig) -> list[str]:
    tokens = cfg.peft.num_virtual_tokens
    if 1 <= tokens < cfg.model.seq_length:
        return []
    return [
        f"peft.num_virtual_tokens={tokens}: must be at least 1 and leave room in "
        f"model.seq_length={cfg.model.seq_length}; 20 is usual"
    ]


def _low_rank(cfg: RunConfig) -> list[str]:
    peft, found = cfg.peft, []
    if peft.rank < 1:
        found.append(f"peft.rank={peft.rank}: must be at least 1; 8 to 64 is usual")
    if peft.alpha <= 0:
        found.append(f"peft.alpha={peft.alpha}: must be larger than 0; twice the rank is usual")
    if not 0.0 <= peft.dropout < 1.0:
        found.append(f"peft.dropout={peft.dropout}: is a share; give a number of at least 0 and below 1")
    wrong = unmatched(cfg.model, peft.target_modules)
    if wrong or not chosen_parts(cfg.model, peft.target_modules):
        found.append(
            f"peft.target_modules={peft.target_modules}: {', '.join(wrong) or 'nothing'} matches no module of "
            f"{cfg.model.name}; choose from {known_targets(cfg.model)}"
        )
    if cfg.model.backend in (Backend.local, Backend.transformer_engine):
        found.append(
            f"peft.method={peft.method.value}: has no layers for model.backend={cfg.model.backend.value}; "
            "set model.backend=torch"
        )
    if peft.quantize_base is BaseQuantization.nf4:
        if importlib.util.find_spec("bitsandbytes") is None:
            found.append(
                "peft.quantize_base=nf4: needs the package bitsandbytes, which is not installed; pip install "
                "'scale-llm[qlora]', or set peft.quantize_base=none"
            )
        if cfg.checkpoint.load is None:
            found.append("peft.quantize_base=nf4: there are no weights to quantise; give checkpoint.load")
    return found
