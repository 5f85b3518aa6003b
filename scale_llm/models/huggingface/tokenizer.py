"""The tokenizer beside a Hugging Face model. No torch."""

import json
from pathlib import Path
from typing import Any

from scale_llm.config.tokenizer import TokenizerConfig


def tokenizer_of(directory: Path, config: dict[str, Any]) -> TokenizerConfig:
    """The tokenizer group for a directory: its tokenizer.json, if it has one, and the text that ends a document.

    config: its config.json.
    """
    if not (directory / "tokenizer.json").is_file():
        return TokenizerConfig()
    found = TokenizerConfig(path=str(directory.resolve()))
    found.eod_token = end_of_text(directory, config) or found.eod_token
    return found


def end_of_text(directory: Path, config: dict[str, Any]) -> str | None:
    """The token that config.json's eos_token_id is in tokenizer.json; of several the first."""
    wanted = config.get("eos_token_id")
    wanted = wanted[0] if isinstance(wanted, list) and wanted else wanted
    try:
        content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    for token in content.get("added_tokens", []):
        if token["id"] == wanted:
            return token["content"]
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: [token, score] by id
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return next((text for text, number in vocabulary.items() if number == wanted), None)


def token_id(directory: Path, text: str) -> int | None:
    """The id of a token in the directory's tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content.get("added_tokens", []):
        if token["content"] == text:
            return token["id"]
    vocabulary = content.get("model", {}).get("vocab", {})
    return vocabulary.get(text) if isinstance(vocabulary, dict) else None
