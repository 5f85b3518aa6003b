"""Whether positions mean to a model what they meant to its weights: no shape tells."""

from typing import Any

from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.io import CONFIG_FILE, load_raw
from scale_llm.config.model import RopeScaling
from scale_llm.config.pins import former_run
from scale_llm.config.run import RunConfig

STRETCH = (
    "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position_embeddings",
)  # fmt: skip


def position_problems(cfg: RunConfig, given: set[str]) -> list[str]:
    """Keys of positions that are another than in what the run goes on from. A longer context is made by changing them,
    but not unawares: those that the user has given may be.

    given: keys of the command line. A Hugging Face directory is compared whole (`huggingface_problems`).
    """
    found = dict[str, str]()
    for where, former in _sources(cfg):
        before = former.get("model") or {}
        for key in _keys(cfg, before):
            now, there = _text(getattr(cfg.model, key)), _text(before[key])
            if now != there and f"model.{key}" not in given:
                found.setdefault(
                    key,
                    f"model.{key}={now}: {where} has {there}, so that its weights would be another function; give "
                    f"model.{key}={there} (model=from_checkpoint takes it), or on the command line what you mean",
                )
    return list(found.values())


def _sources(cfg: RunConfig) -> list[tuple[str, dict[str, Any]]]:
    """(name, configuration) of what the run goes on from; what cannot be read is named elsewhere."""
    found = []
    try:
        if former := former_run(cfg):
            found.append((f"run_dir={cfg.run_dir}", former))
        for key, load in (
            ("checkpoint.load", cfg.checkpoint.load),
            ("stage.reference_load", getattr(cfg.stage, "reference_load", None)),
        ):
            one = latest_checkpoint(load) if load is not None else None
            if one is not None and (one[1] / CONFIG_FILE).is_file():
                found.append((f"{key}={load}", load_raw(one[1] / CONFIG_FILE)))
    except (UserError, ValueError):
        pass
    return found


def _keys(cfg: RunConfig, before: dict[str, Any]) -> list[str]:
    keys = ["rope_scaling", "window_size"]
    if cfg.model.rope_scaling is not RopeScaling.none and before.get("rope_scaling") == cfg.model.rope_scaling.value:
        keys += STRETCH if cfg.model.rope_scaling is RopeScaling.llama3 else STRETCH[:1]
    return [key for key in keys if key in before]


def _text(value: Any) -> str:
    return "null" if value is None else str(value.value if isinstance(value, RopeScaling) else value)
