"""A tokenizer.json as a file: where it is, what names its content, numbers of its tokens. Not by package tokenizers:
`scale-llm --check` looks into it."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_llm.config.data import DataConfig
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
    values = _read(tokenizer_json)
    for added in values.get("added_tokens", []):
        if added["content"] == token:
            return int(added["id"])
    vocabulary = values.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
        return next((number for number, (text, _) in enumerate(vocabulary) if text == token), None)
    found = vocabulary.get(token)
    return None if found is None else int(found)


def _read(tokenizer_json: str) -> dict[str, Any]:
    return json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))


def fim_problems(data: DataConfig, tokenizer_path: str | None, special_tokens: Sequence[str] = ()) -> list[str]:
    """Tokens of `data.fim_*` that a tokenizer has not. tokenizer_path: None for one that is trained here."""
    if data.fim_rate <= 0:
        return []
    names = {key: getattr(data, key) for key in ("fim_prefix_token", "fim_middle_token", "fim_suffix_token")}
    if tokenizer_path is None:
        absent = [name for name in names.values() if name not in special_tokens]
        return (
            [
                f"data.fim_rate={data.fim_rate:g}: a tokenizer trained here has no tokens {', '.join(absent)}; add "
                "them to tokenizer.special_tokens, or set data.fim_rate=0"
            ]
            if absent
            else []
        )
    file = tokenizer_file(tokenizer_path)
    missing = {key: name for key, name in names.items() if token_id(file, name) is None}
    added = [token["content"] for token in _read(file).get("added_tokens", [])]
    near = [token for token in added if any(part in token.lower() for part in ("fim", "prefix", "middle", "suffix"))]
    remedy = f"name one of {', '.join(near[:12])}" if near else "add it to the tokenizer, or set data.fim_rate=0"
    where = f"not in the vocabulary of {tokenizer_path}"
    return [f"data.{key}={token}: {where}; {remedy}" for key, token in missing.items()]
