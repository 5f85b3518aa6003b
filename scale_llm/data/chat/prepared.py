"""Chat data that is tokenised once and found again: what examples, comparisons and prompts have in common.

cache_dir/<folder>/<fingerprint>/   what `build` writes, report.json, prepared.json
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scale_llm.config.data import DataConfig
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.corpus import embedded_files
from scale_llm.data.files import build_once, fingerprint, stamp, write_json
from scale_llm.data.sources import Source, parse_path
from scale_llm.data.splits import split_problems

if TYPE_CHECKING:
    from scale_llm.data.chat.template import ChatTemplate

Build = Callable[[Path, list[str], "ChatTemplate"], tuple[dict[str, Any], dict[str, Any]]]
"""(directory, files, template) -> (report, the fields of the prepared kind's own)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedChat:
    """What ranks need to know of chat data; written to prepared.json."""

    path: str
    """Where this was written."""
    tokenizer_path: str
    vocab_size: int
    """Tokens of the tokenizer; the model may pad it."""
    eod: int
    report: dict[str, Any]
    """What became of the rows; see reading.Report."""
    chat_template: str
    """The template's text."""


Prepared = TypeVar("Prepared", bound=PreparedChat)


def prepare_chat(
    kind: type[Prepared], folder: str, data: DataConfig, tokenizer: TokenizerConfig, *, facts: list[Any],
    cache_dir: str | Path, build: Build,
) -> Prepared:  # fmt: skip
    """Builds the data of `data`, or finds what an earlier call made of the same input.

    Any number of processes may call this at once: one does the work, the others wait for it. facts: all that the
    result depends on beside input and tokenizer.

    Raises:
        UserError: with every problem found.
    """
    from scale_llm.data.chat.template import ChatTemplate

    files, tokenizer_path = _checked_input(data, tokenizer)
    template = ChatTemplate.load(tokenizer_path, tokenizer)
    key = fingerprint([*facts, *_input_facts(data, files, template)])
    entry = Path(cache_dir).expanduser().absolute() / folder / key

    def write(directory: Path) -> None:
        report, own = build(directory, files, template)
        write_json(directory / "report.json", report)
        loaded = template.tokenizer
        prepared = kind(
            path=str(entry / "prepared.json"),
            tokenizer_path=loaded.path,
            vocab_size=loaded.vocab_size,
            eod=loaded.eod,
            report=report,
            chat_template=template.source.text,
            **own,
        )
        write_json(directory / "prepared.json", asdict(prepared))

    return load_prepared(kind, build_once(entry, write))


def load_prepared(kind: type[Prepared], path: str | Path) -> Prepared:
    """Reads a prepared.json, or the one in a directory."""
    file = Path(path)
    file = file / "prepared.json" if file.is_dir() else file
    return kind(**json.loads(file.read_text(encoding="utf-8")))


def _input_facts(data: DataConfig, files: list[str], template: "ChatTemplate") -> list[Any]:
    """All that the tokens of conversations depend on, but what a stage asks for: for a fingerprint."""
    from scale_llm.data.tokenizer_json import file_digest

    loaded = template.tokenizer
    contents = [[stamp(file) for file in files], loaded.path, file_digest(loaded.path), loaded.eod, template.digest]
    settings = [
        data.path is None,
        asdict(data.fields),
        data.format.value,
        data.on_bad_row.value,
        data.on_too_long.value,
    ]
    return [contents, settings]


def _checked_input(data: DataConfig, tokenizer: TokenizerConfig) -> tuple[list[str], str]:
    """(files of conversations, tokenizer); a UserError with every problem."""
    problems = split_problems(data.split)
    if tokenizer.path is None:
        problems.append(
            "tokenizer.path=null: fine-tuning needs the tokenizer of its base model; set model=from_checkpoint with "
            "checkpoint.load, or tokenizer.path"
        )
    sources: list[Source] = []
    try:
        sources = parse_path(data.path)
    except UserError as error:
        problems += error.problems
    if any(source.weight is not None or source.epochs is not None for source in sources):
        problems.append(
            "data.path: weights and epochs are not for conversations, each is used once an epoch; leave the numbers "
            "out, or weigh rows by their field data.fields.weight"
        )
    problems += [problem for source in sources for problem in _unfit(source)]
    if problems or tokenizer.path is None:
        raise UserError(problems)
    if data.path is None:
        return embedded_files(data.embedded_megabytes), tokenizer.path
    return [file for source in sources for file in source.files], tokenizer.path


def _unfit(source: Source) -> list[str]:
    """Files of a source that hold no conversations."""
    if source.kind == "embedded":
        return []
    unfit = [file for file in source.files if source.kind == "indexed" or file.removesuffix(".gz").endswith(".txt")]
    kind = "indexed tokens" if source.kind == "indexed" else "plain text"
    return [f"data.path={file}: {kind} cannot hold conversations; give JSONL, JSON or Parquet" for file in unfit]
