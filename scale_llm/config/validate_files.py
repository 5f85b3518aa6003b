"""What is on disk: a run directory that can be written and holds no other model, a checkpoint that fits."""

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scale_llm.config.checkpoint_files import TOKENIZER_DIR, TRACKER, iteration_dir, latest_checkpoint, saved_iterations
from scale_llm.config.errors import UserError
from scale_llm.config.io import CONFIG_FILE, load_raw
from scale_llm.config.peft import PeftMethod
from scale_llm.config.pins import former_run, pin_problems
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import DpoConfig, UntrainedStageConfig
from scale_llm.config.validate_peft import other_adapters

FREE = {
    "name",
    "backend",
    "compile_ops",
    "architecture",
    "rope_scaling",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
    "window_size",
    "seq_length",
    "max_position_embeddings",
    "hidden_dropout",
    "attention_dropout",
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    "init_method_std",
    "make_vocab_size_divisible_by",
}
"""Keys of the model that a checkpoint does not fix; those of stretched and windowed positions may be changed by who
names them (`validate_positions`)."""


def file_problems(cfg: RunConfig) -> list[str]:
    """Problems of run_dir and of the directories that are written or read."""
    found = [*_writable("run_dir", cfg.run_dir), *_writable_elsewhere(cfg), *_same_run(cfg)]
    found += _load(cfg, "checkpoint.load", cfg.checkpoint.load)
    if isinstance(cfg.stage, DpoConfig):
        problems = _load(cfg, "stage.reference_load", cfg.stage.reference_load)
        found += problems or other_tokenizer(cfg, cfg.stage.reference_load, "stage.reference_load")
    if isinstance(cfg.stage, PolicyStageConfig):
        found += _load(cfg, "stage.reference_load", cfg.stage.reference_load)
    return found


def _writable(key: str, directory: str) -> list[str]:
    path = Path(directory)
    if path.exists() and not path.is_dir():
        return [f"{key}={directory}: is a file; give a directory"]
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return [f"{key}={directory}: {parent} is a file; give another directory"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"{key}={directory}: {parent} is not writable for this user; give another directory"]
    return []


def _writable_elsewhere(cfg: RunConfig) -> list[str]:
    """Directories outside run_dir that the run writes."""
    places = {"checkpoint.save": cfg.checkpoint.save, "data.cache_dir": cfg.data.cache_dir,
              "checkpoint.local_dir": cfg.checkpoint.local_dir}  # fmt: skip
    inside = os.path.abspath(cfg.run_dir)
    outside = {key: path for key, path in places.items() if path and not os.path.abspath(path).startswith(inside)}
    return [problem for key, path in outside.items() for problem in _writable(key, path)]


def _same_run(cfg: RunConfig) -> list[str]:
    """A directory where another model has trained; one whose run never got to a step may be used again."""
    try:
        former = former_run(cfg)
    except UserError as error:
        return error.problems
    if not former:
        return []
    what = f"run_dir={cfg.run_dir}: holds a run of"
    stage = (former.get("stage") or {}).get("name")
    if stage != cfg.stage.name:
        return [f"{what} stage {stage}, this one is {cfg.stage.name}; give another run_dir"]
    found = _other_model(cfg, former, f"{what} another model", "give another run_dir, or the model it holds")
    if not isinstance(cfg.stage, UntrainedStageConfig):
        found += other_adapters(cfg, former, f"{what} other adapters", "give another run_dir, or the adapters it holds")
    return found + pin_problems(cfg)


def _load(cfg: RunConfig, key: str, load: str | None) -> list[str]:
    """Problems of a checkpoint that is read."""
    if load is None:
        return []
    path = Path(load)
    if not path.is_dir():
        return [f"{key}={load}: no such directory; give the checkpoints directory of a run"]
    try:
        found = latest_checkpoint(path)
    except ValueError as error:
        return [f"{key}={load}: {error}; {_one_of(path)}"]
    if found is None:
        inside = path / "checkpoints"
        hint = str(inside) if (inside / TRACKER).is_file() else "the checkpoints directory of a run"
        return [f"{key}={load}: holds no {TRACKER}; give {hint}"]
    one = found[1]
    if not one.is_dir():
        return [f"{key}={load}: {TRACKER} names {one.name}, which is not there; {_one_of(path)}"]
    if not (one / CONFIG_FILE).is_file():
        return []  # Hugging Face's, or Megatron-LM's: its shapes are compared when it is read
    try:
        former = load_raw(one / CONFIG_FILE)
    except UserError as error:
        return error.problems
    problems = _other_model(cfg, former, f"{key}={load}: holds another model", "choose that model")
    if (former.get("peft") or {}).get("method", "none") == "none":
        return problems
    if cfg.peft.method is PeftMethod.none:
        return [*problems, adapters_alone(key, load)]
    remedy = "choose those, which the run goes on from, or merge them first (tools/convert_checkpoint.py merge)"
    return problems + other_adapters(cfg, former, f"{key}={load}: holds other adapters", remedy)


def adapters_alone(key: str, load: str) -> str:
    """The problem of a checkpoint that a whole model is to be read from."""
    merge = "merge them into their base (tools/convert_checkpoint.py merge), and give that"
    return f"{key}={load}: holds adapters alone; {merge}"


def _one_of(directory: Path) -> str:
    """What to give in place of a directory whose tracker names no checkpoint."""
    there = saved_iterations(directory)
    if not there:
        return "give the checkpoints directory of another run"
    return f"give the directory of one of its checkpoints, such as {iteration_dir(directory, there[0])}"


def other_tokenizer(cfg: RunConfig, load: str | None, key: str) -> list[str]:
    """A second model whose token ids mean other tokens."""
    if load is None or cfg.tokenizer.path is None:
        return []
    found = latest_checkpoint(load)
    own = Path(cfg.tokenizer.path)
    files = [own / "tokenizer.json" if own.is_dir() else own]
    if found is not None:
        files += [found[1] / TOKENIZER_DIR / "tokenizer.json", found[1] / "tokenizer.json"]
    texts = [file.read_bytes() for file in files if file.is_file()]
    if len(set(texts)) < 2:
        return []
    return [
        f"{key}={load}: holds another tokenizer than {files[0]}, so that its tokens mean other text; give a model with "
        "the policy's tokenizer"
    ]


def _other_model(cfg: RunConfig, former: dict[str, Any], what: str, remedy: str) -> list[str]:
    before = former.get("model") or {}
    now: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(cfg.model), enum_to_str=True)  # type: ignore[assignment]
    different = [
        f"model.{key}={now[key]} (there {before[key]})"
        for key in now
        if key in before and key not in _free(now) and before[key] != now[key]
    ]
    return [f"{what}: {', '.join(different)}; {remedy}"] if different else []


def _free(model: dict[str, Any]) -> set[str]:
    """Keys that may differ; the length of a learned position table may not."""
    free = FREE if model["head"] == "language_model" else FREE | {"head"}  # a language model's body, a head that is new
    learned = model["position_embedding_type"] == "learned_absolute"
    return free - {"max_position_embeddings"} if learned else free
