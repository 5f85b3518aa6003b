"""Where a chat template and its special tokens come from: the configuration, or files beside the tokenizer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig

PLAIN = Path(__file__).with_name("templates") / "plain.jinja"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What templates may call special tokens."""


class TemplateSource(NamedTuple):
    text: str
    path: str
    """The file that it came from."""


def template_source(directory: Path, config: TokenizerConfig) -> TemplateSource:
    """The first of: the file of the configuration, chat_template.jinja and tokenizer_config.json beside the tokenizer,
    the built-in one."""
    if config.chat_template is not None:
        return _named(config.chat_template)
    beside = directory / "chat_template.jinja"
    if beside.is_file():
        return TemplateSource(_read(beside), str(beside))
    settings = directory / "tokenizer_config.json"
    text = _default_of(_json(settings).get("chat_template"), settings)
    return TemplateSource(text, str(settings)) if text else TemplateSource(_read(PLAIN), str(PLAIN))


def special_tokens(directory: Path, eod_token: str) -> dict[str, str]:
    """{name in templates: text} of a tokenizer's special tokens; without an eos_token that is the end of document."""
    found = {"eos_token": eod_token}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter is what transformers reads first
        settings = _json(directory / name)
        for key in SPECIAL_NAMES:
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                found[key] = token
    return found


def _named(name: str) -> TemplateSource:
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"tokenizer.chat_template={name}: no such file; give a Jinja file, or null for the tokenizer's")
    return TemplateSource(_read(path), str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert the chat template to UTF-8") from error


def _default_of(value: Any, path: Path) -> str | None:
    """The template named default, where there are several."""
    if not isinstance(value, list):
        return value or None
    named = {each["name"]: each["template"] for each in value}
    if "default" not in named:
        raise UserError(
            f"{path}: chat_template has {', '.join(named) or 'no template'} and no default; write the one you want "
            "to a file and set tokenizer.chat_template"
        )
    return named["default"]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the tokenizer again") from error
