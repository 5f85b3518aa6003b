"""What lies beside the weights of an exported model: its configuration, how it generates, its tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from scale_llm.checkpoint.huggingface.source import FOLDER, read_json
from scale_llm.checkpoint.writing import special_ids
from scale_llm.config.checkpoint_files import SPECIAL_IDS, TOKENIZER_DIR, TOKENIZER_FILES
from scale_llm.config.model import Head
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import SequenceStageConfig
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.prompts import turn_ends
from scale_llm.data.chat.template import ChatTemplate
from scale_llm.data.chat.template_files import special_tokens
from scale_llm.data.chat.turns import RowError
from scale_llm.models.huggingface import Family, write_config
from scale_llm.models.huggingface.tokenizer import token_id


def write_model_files(directory: Path, path: Path, cfg: RunConfig, family: Family, dtype: torch.dtype) -> None:
    """Everything but the tensors. path: the checkpoint; cfg: its configuration."""
    places = _places(path, cfg)
    _copy_tokenizer(places, cfg, directory)
    config = _config(places, directory, cfg, family, dtype)
    _write(directory / "config.json", config)
    file = directory / "generation_config.json"
    tokens = {key: config[key] for key in SPECIAL_IDS if config.get(key) is not None}
    generation = read_json(file) if file.is_file() else tokens
    if isinstance(cfg.stage, SequenceStageConfig | PolicyStageConfig) and cfg.model.head is Head.language_model:
        generation["eos_token_id"] = _with_turn_ends(generation.get("eos_token_id"), directory, cfg)
    _write(file, generation)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _places(path: Path, cfg: RunConfig) -> list[Path]:
    """Where the tokenizer and the first configuration may lie, the likeliest first."""
    places = [path / TOKENIZER_DIR, path.parent / FOLDER]
    if cfg.tokenizer.path is not None:
        places.append(Path(cfg.tokenizer.path))
    elif cfg.data.cache_dir is not None:
        places.append(Path(cfg.data.cache_dir))  # a run that trained its own
    return [place for place in places if place.is_dir()]


def _copy_tokenizer(places: list[Path], cfg: RunConfig, directory: Path) -> None:
    for place in reversed(places):
        for name in TOKENIZER_FILES:
            if (place / name).is_file():
                shutil.copyfile(place / name, directory / name)
    given = Path(cfg.tokenizer.path) if cfg.tokenizer.path else None
    if given is not None and given.is_file():
        shutil.copyfile(given, directory / "tokenizer.json")


def _config(places: list[Path], directory: Path, cfg: RunConfig, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """config.json."""
    base = next((read_json(place / "config.json") for place in places if (place / "config.json").is_file()), None)
    config = write_config(cfg.model, family, str(dtype).removeprefix("torch."), base or special_ids(places))
    if "eos_token_id" not in config:  # else transformers takes the number that its class has by default
        config["eos_token_id"] = token_id(directory, cfg.tokenizer.eod_token)
        config.setdefault("bos_token_id", config["eos_token_id"])
    ends = _listed(config["eos_token_id"])
    if cfg.model.head is not Head.language_model and config.get("pad_token_id") in (None, *ends):
        # transformers reads the last token that is no padding, and takes no batch without one
        padding = special_tokens(directory, cfg.tokenizer.eod_token).get("pad_token")
        found = token_id(directory, padding) if padding is not None else None
        if found is not None and found not in ends:
            config["pad_token_id"] = found
    return config


def _with_turn_ends(known: Any, directory: Path, cfg: RunConfig) -> Any:
    """eos_token_id of a model that has learnt conversations: the ends of the assistant's turns are among them."""
    if token_id(directory, cfg.tokenizer.eod_token) is None:
        return known
    own = TokenizerConfig(eod_token=cfg.tokenizer.eod_token)  # its template lies beside it
    try:
        ends = turn_ends(ChatTemplate.load(str(directory), own))
    except RowError:  # a template that asks for more than a question and an answer
        return known
    every = [*_listed(known), *sorted(ends - set(_listed(known)))]
    return every if len(every) > 1 else every[0]


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
