#!/usr/bin/env python3
"""Text to Megatron's indexed tokens: PREFIX_KEY_document.bin and .idx. Flags have Megatron-LM's names.

  python tools/preprocess_data.py --input books.jsonl --output-prefix data/books --tokenizer-model my_tokenizer/ \\
      --append-eod
  python tools/preprocess_data.py --input 'curated/documents/*.jsonl.gz' more.parquet --output-prefix data/web \\
      --tokenizer-model tokenizer.json --append-eod --workers 16
  python tools/preprocess_data.py --append --input new.jsonl --output-prefix data/books --append-eod \\
      --tokenizer-model my_tokenizer/
  python tools/preprocess_data.py --merge --input data/books_text_document data/web_text_document --output-prefix all

Reads JSONL, JSON and text (plain, .gz, .bz2, .xz, .zst) and Parquet. The same command again does nothing, or goes on
where it was killed; the files are the same bytes for any number of workers. --append adds the files that the output
does not hold yet. An output that was made of other files or with other settings is refused.
"""

import argparse
import glob
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale_llm.config.errors import UserError, numbered  # noqa: E402
from scale_llm.launch.environment import quiet_imports  # noqa: E402

FLAGS = {
    "data.path=": "--input=", "data.fields.text": "--json-keys", "data.index_workers": "--workers",
    "data.max_document_megabytes": "--max-document-megabytes", "tokenizer.path=": "--tokenizer-model=",
    "tokenizer.path": "--tokenizer-model", "tokenizer.eod_token=": "--eod-token=",
}  # fmt: skip


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, globs or directories; for --merge prefixes")
    add("--output-prefix", required=True, metavar="PREFIX", help="of the files to write, without .bin and .idx")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields to index, a pair for each (text)")
    add("--tokenizer-type", choices=("HuggingFaceTokenizer", "GPT2BPETokenizer"), default="HuggingFaceTokenizer")
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json, or a directory that holds one")
    add("--vocab-file", metavar="FILE", help="vocab.json of a GPT2BPETokenizer")
    add("--merge-file", metavar="FILE", help="merges.txt of a GPT2BPETokenizer")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--eod-token", metavar="TOKEN", help="that token (default: the tokenizer's eos_token, or <|endoftext|>)")
    add("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    add(
        "--on-bad-row",
        choices=("fail", "drop"),
        default="fail",
        help="stop with files and lines, or leave out and count",
    )
    add("--max-document-megabytes", type=float, default=16.0, metavar="MB", help="larger ones are bad rows (16)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--append", action="store_true", help="add to what the output holds")
    mode.add_argument(
        "--merge", action="store_true", help="join indexed files, given as prefixes or a directory of them"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments = arguments_of(words)
    quiet_imports()
    try:
        merge(arguments) if arguments.merge else index(arguments)
    except UserError as error:
        print(numbered(list(map(in_flags, error.problems))), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def in_flags(problem: str) -> str:
    """A problem with this tool's names for keys of the configuration."""
    for key, flag in FLAGS.items():
        problem = problem.replace(key, flag)
    return problem


def index(arguments: argparse.Namespace) -> None:
    from scale_llm.data.cache_entries import document_name
    from scale_llm.data.files import locked
    from scale_llm.data.index_output import index_output
    from scale_llm.data.index_work import left_out_lines
    from scale_llm.data.progress import byte_progress

    files = input_files(arguments.input)
    named: dict[str, str] = {}
    for key in arguments.json_keys:
        other = named.setdefault(document_name(key), key)
        if other != key:
            target = f"{arguments.output_prefix}_{document_name(key)}"
            raise UserError([f"--json-keys={other} {key}: both would be written to {target}; give each its own prefix"])
    os.makedirs(os.path.dirname(os.path.abspath(arguments.output_prefix)), exist_ok=True)
    tokenizer = tokenizer_of(arguments)
    for name, key in named.items():
        prefix = f"{os.path.abspath(arguments.output_prefix)}_{name}"
        settings = settings_of(arguments, tokenizer, key)
        total = sum(map(os.path.getsize, files))
        lock = Path(prefix).with_name(f".{Path(prefix).name}.lock")
        with locked(lock), byte_progress(f"index {key}", total, sys.stdout.isatty()) as on_bytes:
            counts, any_work = index_output(
                prefix, files, settings, append=arguments.append, workers=arguments.workers, on_bytes=on_bytes
            )
        state = "" if any_work else "nothing to do; "
        print(f"{prefix}: {state}{counts.num_documents:,} documents, {counts.num_tokens:,} tokens ({settings.dtype})")
        print("".join(f"  {in_flags(line)}\n" for line in left_out_lines(counts.left_out())), end="")


def merge(arguments: argparse.Namespace) -> None:
    from scale_llm.data.index_output import merge_output
    from scale_llm.data.indexed_check import read_header

    sources, problems = [], []
    for entry in arguments.input:
        found = _pairs(entry) if os.path.isdir(entry) else [f"{entry.removesuffix('.idx')}.idx"]
        problems += [] if found else [f"--input={entry}: no .idx in this directory; give prefixes of indexed files"]
        sources += [os.path.abspath(file.removesuffix(".idx")) for file in found]
    if problems:
        raise UserError(problems)
    prefix = os.path.abspath(arguments.output_prefix)
    any_work = merge_output(prefix, [each for each in sources if each != prefix])
    dtype, sequences, _ = read_header(prefix)
    print(f"{prefix}: {'' if any_work else 'nothing to do; '}{sequences:,} documents ({dtype})")


def _pairs(directory: str) -> list[str]:
    """Its .idx files but for what a merge that was killed has left."""
    return sorted(file for file in glob.glob(f"{directory}/*.idx") if ".tmp-" not in os.path.basename(file))


def input_files(entries: list[str]) -> list[str]:
    """Absolute paths in the given order."""
    from scale_llm.data.sources import parse_path

    sources = parse_path(entries)
    indexed = [f"--input={source.files[0]}: indexed already; add --merge" for source in sources if source.kind != "raw"]
    if indexed:
        raise UserError(indexed)
    return list(dict.fromkeys(file for source in sources for file in source.files))


def tokenizer_of(arguments: argparse.Namespace) -> str:
    """Path of a tokenizer.json; that of a GPT2BPETokenizer is written beside the output."""
    from scale_llm.data.tokenizer import gpt2_tokenizer, tokenizer_file

    if arguments.tokenizer_type == "HuggingFaceTokenizer":
        if arguments.tokenizer_model is None:
            raise UserError("--tokenizer-model: missing; give a tokenizer.json or a directory with one")
        return tokenizer_file(arguments.tokenizer_model)
    if arguments.vocab_file is None or arguments.merge_file is None:
        raise UserError("--vocab-file, --merge-file: missing; a GPT2BPETokenizer needs both")
    path = Path(f"{os.path.abspath(arguments.output_prefix)}_tokenizer.json")
    gpt2_tokenizer(arguments.vocab_file, arguments.merge_file, path)
    return str(path)


def settings_of(arguments: argparse.Namespace, tokenizer: str, key: str):
    from scale_llm.data.cache_entries import max_document_bytes
    from scale_llm.data.index_work import IndexSettings
    from scale_llm.data.indexing import token_dtype
    from scale_llm.data.tokenizer import Tokenizer, default_eod

    eod = (arguments.eod_token or default_eod(tokenizer)) if arguments.append_eod else None
    return IndexSettings(
        tokenizer=tokenizer, eod_token=eod, dtype=token_dtype(Tokenizer.load(tokenizer, eod).vocab_size),
        text_field=key, max_document_bytes=max_document_bytes(arguments.max_document_megabytes),
        drop_bad_rows=arguments.on_bad_row == "drop",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
