"""Prompts as tokens, ready for an answer, each with the row it came from.

cache_dir/prompts/<fingerprint>/   prompts.jsonl: {"tokens": [...], "row": {...}}; prepared.json
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scale_llm.config.data import DataConfig, TooLong
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.conversation import conversation_tools, with_system
from scale_llm.data.chat.embedded import embedded_conversations
from scale_llm.data.chat.parting import prompt_of
from scale_llm.data.chat.prepared import PreparedChat, prepare_chat
from scale_llm.data.chat.reading import Report, bad_rows, no_usable_row, read_parsed
from scale_llm.data.chat.template import ChatTemplate
from scale_llm.data.chat.turns import Message, RowError
from scale_llm.data.progress import byte_progress
from scale_llm.data.rows import Problems, Row

FORMAT = 2
"""Raised when the same input would give other files, so that old cache entries are left alone."""


class Prompt(NamedTuple):
    tokens: list[int]
    """The conversation so far and what the template writes before an answer."""
    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedPrompts(PreparedChat):
    """What ranks need to know of the prompts."""

    stop: list[int]
    """Tokens that end an answer: of the text, and of an assistant's turn by the template."""
    num_prompts: int
    longest: int
    """Tokens of the longest prompt."""


def prepare_prompts(
    data: DataConfig, tokenizer: TokenizerConfig, *, longest: int, cache_dir: str | Path, show_progress: bool = False
) -> PreparedPrompts:
    """Tokenises the prompts of `data`, or finds what an earlier call made of the same input.

    longest: tokens of a prompt at most; longer ones are left out or are an error, as data.on_too_long says.

    Raises:
        UserError: with every problem found.
    """

    def build(directory: Path, files: list[str], template: ChatTemplate) -> tuple[dict[str, Any], dict[str, Any]]:
        report = Report(files=list(files))
        with byte_progress("tokenise prompts", sum(map(os.path.getsize, files)), show_progress) as on_bytes:
            _write(directory / "prompts.jsonl", files, data, template, longest, report, on_bytes)
        counts = {"num_prompts": report.kept, "longest": report.longest}
        return report.finished(), {"stop": sorted(turn_ends(template)), **counts}

    facts = [FORMAT, longest]
    return prepare_chat(PreparedPrompts, "prompts", data, tokenizer, facts=facts, cache_dir=cache_dir, build=build)


def load_prompts(prepared: PreparedPrompts) -> list[Prompt]:
    """The prompts in the order of their rows."""
    with open(Path(prepared.path).parent / "prompts.jsonl", encoding="utf-8") as file:
        return [Prompt(**json.loads(line)) for line in file]


def turn_ends(template: ChatTemplate) -> set[int]:
    """Tokens at which an answer is over: the end of the text, and the last special token of an assistant's turn."""
    said: list[Message] = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "Yes."}]
    encoded = template.encode(said)
    special = template.tokenizer.special_ids
    turn = [token for token, trained in zip(encoded.tokens, encoded.trained, strict=True) if trained]
    return {template.tokenizer.eod} | {token for token in turn if token in special}


def _write(
    path: Path, files: list[str], data: DataConfig, template: ChatTemplate, longest: int, report: Report, on_bytes
) -> None:
    bad, long = bad_rows(data.on_bad_row, report), Problems()
    with open(path, "w", encoding="utf-8") as out:
        for row, messages, tools in _parsed(files, data, bad, on_bytes):
            try:
                tokens = template.prompt(messages, tools)
            except RowError as error:
                bad.add(row.file, row.line, error.message, error.kind)
                continue
            if len(tokens) > longest:
                _too_long(row, len(tokens), longest, data.on_too_long, report, long)
                continue
            report.kept, report.tokens = report.kept + 1, report.tokens + len(tokens)
            report.longest = max(report.longest, len(tokens))
            out.write(json.dumps({"tokens": tokens, "row": row.values}, ensure_ascii=False, default=str) + "\n")
    problems = bad.found + long.found
    if not problems and not report.kept:
        problems = [no_usable_row(data.path, report.finished())]
    if problems:
        raise UserError(problems)


def _parsed(files: list[str], data: DataConfig, bad: Problems, on_bytes) -> Iterator[tuple[Row, list[Message], Any]]:
    """(row, messages before the answer, tools) of every row; without files of the user's own, questions about the
    standard library."""
    if data.path is not None:
        for name in files:
            yield from read_parsed(name, lambda row: _prompt(row, data), bad, on_bytes)
        return
    for each in embedded_conversations(files, on_bytes):
        question, answer = each.messages
        values = {data.fields.prompt: question["content"], data.fields.ground_truth: answer["content"]}
        yield Row(values, each.file, each.line), [question], None


def _prompt(row: Row, data: DataConfig) -> tuple[Row, list[Message], Any]:
    """The messages before the answer; those of a whole conversation without its last turn."""
    values, fields = dict(row.values), data.fields
    for field in (fields.messages, fields.conversations):
        said = values.get(field)
        if isinstance(said, list) and len(said) > 1 and _speaker(said[-1], fields) in ("assistant", "gpt"):
            values[field] = said[:-1]
    prompt = prompt_of(values, data.format, fields)
    if not prompt.messages:
        raise RowError(f"no prompt; give a field {fields.prompt!r} or {fields.messages!r}", "no prompt")
    return row, with_system(prompt.messages, values, fields), conversation_tools(values, fields)


def _speaker(turn: Any, fields) -> Any:
    return turn.get(fields.role) or turn.get(fields.sender) if isinstance(turn, dict) else None


def _too_long(row: Row, count: int, longest: int, policy: TooLong, report: Report, long: Problems) -> None:
    message = f"the prompt has {count} tokens, more than the {longest} that leave room for an answer"
    if policy is TooLong.fail:
        long.add(row.file, row.line, f"{message}; raise model.seq_length, or set data.on_too_long=drop", "too long")
    else:
        report.drop(row.file, row.line, f"{message}; raise model.seq_length", "too long")
