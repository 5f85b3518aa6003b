"""A tokenizer.json as a file: where it is, what names its content, numbers of its tokens. Not by package tokenizers:
`scale-llm --check` looks into it."""

import hashlib
import json
import os
from pathlib import Path

from scale_llm.config.errors import UserError


def tokenizer_file(path: str) -> str:
    """Absolute path of the tokenizer.json that `tokenizer.path` names."""
    full = os.path.abspath(os.path.expanduser(path))
    file = os.path.join(full, "tokenizer.json") if os.path.isdir(full) else full
    if not os.path.isfile(file):
        raise UserError(f"tokenizer.path={path}: no such file ({file}); give a tokenizer.json or a directory with one")
    return file


def file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def token_id(tokenizer_json: str, token: str) -> int | None:
    """The number of a token in a tokenizer.json; None where it has none. Reads the file alone: building the tokenizer
    takes a second for large vocabularies."""
    values = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
    for added in values.get("added_tokens", []):
        if added["content"] == token:
            return int(added["id"])
    vocabulary = values.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
        return next((number for number, (text, _) in enumerate(vocabulary) if text == token), None)
    found = vocabulary.get(token)
    return None if found is None else int(found)
