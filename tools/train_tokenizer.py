#!/usr/bin/env python3
"""Trains a byte-level BPE tokenizer that transformers' AutoTokenizer loads, and reports how well it fits the text.

  python tools/train_tokenizer.py --input books.jsonl web/ --output my_tokenizer --vocab-size 32000
  python tools/train_tokenizer.py --input chats.jsonl --output my_tokenizer --vocab-size 32000 \\
      --special-tokens '<|im_start|>' '<|im_end|>' --chat-template chat.jinja --compare other_tokenizer/
  python tools/train_tokenizer.py --input a.jsonl b.parquet --compare one/ two/tokenizer.json --report fertility

Every entry of --input is a source, of which the first --sample-megabytes in equal parts are read; one document in ten
is kept from training for the report: OUTPUT/fertility.md and .json, by language and source, of the tokenizer and of
those given with --compare. Without --output nothing is trained; a tokenizer that is there is not trained again.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale_llm.config.errors import UserError, numbered  # noqa: E402
from scale_llm.config.tokenizer import TokenizerConfig  # noqa: E402

HELD_OUT = 10
"""One document in so many is for the report."""


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = TokenizerConfig()
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="text, JSONL or Parquet: files, globs, directories")
    add("--output", type=Path, metavar="DIR", help="the tokenizer's directory")
    add("--json-key", default="text", metavar="KEY", help="field of the text (text)")
    add("--vocab-size", type=int, default=defaults.vocab_size, help=f"special tokens included ({defaults.vocab_size})")
    add("--eod-token", default=defaults.eod_token, help=f"end of documents ({defaults.eod_token})")
    add("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="further special tokens")
    add("--chat-template", metavar="FILE", help="Jinja file that the tokenizer keeps")
    add("--sample-megabytes", type=float, default=64.0, metavar="MB", help="text that is read (64)")
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="PATH",
        help="tokenizers for the report: tokenizer.json or directory",
    )
    add("--report", type=Path, metavar="PREFIX", help="of the report's .md and .json (default: OUTPUT/fertility)")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments = arguments_of(words)
    try:
        run(arguments)
    except UserError as error:
        print(numbered(list(map(in_flags, error.problems))), file=sys.stderr)
        return error.exit_status
    return 0


def in_flags(problem: str) -> str:
    """A problem with this tool's names for keys of the configuration."""
    for key, flag in {
        "data.path=": "--input=", "data.fields.text": "--json-key", "tokenizer.path=": "--compare=",
        "tokenizer.vocab_size": "--vocab-size", "tokenizer.special_tokens": "--special-tokens",
        "tokenizer.chat_template": "--chat-template",
    }.items():  # fmt: skip
        problem = problem.replace(key, flag)
    return problem


def run(arguments: argparse.Namespace) -> None:
    from scale_llm.data.fertility import as_markdown, fertility
    from scale_llm.data.files import write_json

    check(arguments)
    sources = sources_of(arguments.input)
    if arguments.output is not None:
        train(arguments, sources)
    target = arguments.report or arguments.output / "fertility"
    report = fertility(texts(arguments, sources, held_out=True), tokenizers_of(arguments), language_of())
    if not report["all"]["documents"]:
        report = fertility(texts(arguments, sources, held_out=False), tokenizers_of(arguments), language_of())
    write_json(target.with_name(f"{target.name}.json"), report)
    written = as_markdown(report)
    target.with_name(f"{target.name}.md").write_text(written, encoding="utf-8")
    print(written.split("\n## ")[0])
    print(f"{target}.md, {target}.json")


def check(arguments: argparse.Namespace) -> None:
    problems = []
    if arguments.output is None and not arguments.compare:
        problems.append(
            "--output, --compare: nothing to do; name a directory for a tokenizer, or tokenizers to compare"
        )
    if arguments.output is None and arguments.report is None:
        problems.append("--report: missing; without --output it says where the report goes")
    if arguments.sample_megabytes <= 0:
        problems.append(f"--sample-megabytes={arguments.sample_megabytes}: must be more than 0")
    if problems:
        raise UserError(problems)


def sources_of(entries: list[str]) -> dict[str, list[str]]:
    """{entry: its files}."""
    from scale_llm.data.sources import parse_path

    sources = dict(zip(entries, parse_path(entries), strict=True))
    indexed = [name for name, source in sources.items() if source.kind != "raw"]
    if indexed:
        raise UserError([f"--input={name}: is indexed already; give text" for name in indexed])
    return {name: list(source.files) for name, source in sources.items()}


def texts(arguments: argparse.Namespace, sources: dict[str, list[str]], *, held_out: bool) -> Iterator:
    """Of each source the first part: its documents with the number 10, 20, ..., or all others."""
    from scale_llm.data import corpus
    from scale_llm.data.fertility import Text

    for name, files in sources.items():
        left, problems = arguments.sample_megabytes * 1e6 / len(sources), corpus.Problems()
        documents = itertools.chain.from_iterable(
            corpus.read_file(file, arguments.json_key, problems) for file in files
        )
        for number, text in enumerate(documents, start=1):
            if (number % HELD_OUT == 0) == held_out:
                yield Text(name, text)
            left -= len(text.encode())
            if left <= 0:
                break
        problems.raise_any()


def train(arguments: argparse.Namespace, sources: dict[str, list[str]]) -> None:
    """Makes the directory, or finds that it was made by the same command."""
    import json

    from scale_llm.data.files import build_once, stamp, write_json
    from scale_llm.data.tokenizer_files import chat_template, train_directory

    config = TokenizerConfig(
        vocab_size=arguments.vocab_size, eod_token=arguments.eod_token, special_tokens=arguments.special_tokens,
        chat_template=arguments.chat_template,
    )  # fmt: skip
    made_of = {
        "vocab_size": config.vocab_size, "special_tokens": [config.eod_token, *config.special_tokens],
        "chat_template": chat_template(config), "json_key": arguments.json_key,
        "sample_megabytes": arguments.sample_megabytes,
        "files": [stamp(file) for files in sources.values() for file in files],
    }  # fmt: skip

    def build(directory: Path) -> None:
        train_directory((each.text for each in texts(arguments, sources, held_out=False)), config, directory)
        write_json(directory / "made_of.json", made_of)

    directory = Path(os.path.abspath(arguments.output))
    known = directory / "made_of.json"
    if directory.exists() and not (known.is_file() and json.loads(known.read_text(encoding="utf-8")) == made_of):
        raise UserError(f"--output={directory}: holds something else already; give another directory, or delete it")
    build_once(directory, build)


def tokenizers_of(arguments: argparse.Namespace) -> dict:
    """{name: tokenizer}, the trained one first."""
    from scale_llm.data.tokenizer import Tokenizer

    paths = [*([arguments.output] if arguments.output else []), *arguments.compare]
    return {str(path): Tokenizer.load(str(path), None) for path in paths}


def language_of():
    """Tells a text's language, as tools/curate_data.py does, where that is installed."""
    try:
        from scale_llm.curate.filters import identifier
    except ImportError:
        print("languages are not told apart: pip install '.[curate]'", file=sys.stderr)
        return lambda text: "not told"
    classify = identifier().classify
    return lambda text: classify(text[max(0, len(text) // 2 - 500) :][:1000])[0]


if __name__ == "__main__":
    sys.exit(main())
