"""From `data.path` to files on disk. Imports neither torch nor megatron: `scale-llm --check` runs it."""

import glob
import os
from dataclasses import dataclass
from typing import Any

from scale_llm.config.errors import UserError
from scale_llm.data.indexed_check import check_indexed
from scale_llm.data.path_entries import Entry, read_entries, temperature_problems

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
RAW_EXTENSIONS = (
    ".parquet",
    *(kind + compression for kind in (".txt", ".jsonl", ".json") for compression in ("", *COMPRESSIONS)),
)
INDEXED_EXTENSIONS = (".bin", ".idx")
_REMEDY = (
    "give files that end in .txt, .jsonl or .json (also .gz, .bz2, .xz, .zst) or .parquet, or the prefix of a .bin and "
    ".idx pair"
)
EMBEDDED_NAME = "the standard library of Python"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One entry of `data.path`."""

    kind: str
    """embedded, raw (text, JSONL, Parquet) or indexed (Megatron's .bin and .idx)."""
    files: tuple[str, ...] = ()
    """Absolute paths, sorted; for indexed sources the prefixes without .bin and .idx; none for embedded."""
    weight: float | None = None
    """Share of the samples, not normalised; None: as `epochs` or `data.temperature` say, else as much as it holds."""
    epochs: float | None = None
    """Passes over it for one pass over a source that says nothing."""
    name: str = ""
    """As `data.path` has it."""


def parse_path(path: Any, temperature: float = 1.0) -> list[Source]:
    """Sources that `data.path` names, in the given order.

    Takes None (the embedded corpus) and the forms of path_entries.py.

    Raises:
        UserError: with every problem of the whole list, and of `data.temperature` with it.
    """
    if path is None:
        embedded = Entry(name=EMBEDDED_NAME, paths=())
        if problems := temperature_problems([embedded], temperature):
            raise UserError(problems)
        return [Source(kind="embedded", name=EMBEDDED_NAME)]
    entries, problems = read_entries(path, temperature, _REMEDY)
    sources = []
    for entry in entries:
        parts = [_expand(each) for each in entry.paths]
        wrong = [part for part in parts if isinstance(part, str)]
        found = [part for part in parts if not isinstance(part, str)]
        problems += wrong
        if len({kind for kind, _ in found}) > 1:
            problems.append(f"data.path.{entry.name}: mixes indexed files with text; make them two sources")
        elif not wrong:
            files = tuple(dict.fromkeys(file for _, files in found for file in files))
            kind = found[0][0]
            sources.append(Source(kind=kind, files=files, weight=entry.weight, epochs=entry.epochs, name=entry.name))
    if problems:
        raise UserError(problems)
    return sources


def path_problems(path: Any, vocab_size: int | None = None, temperature: float = 1.0) -> list[str]:
    """Everything wrong with `data.path` and `data.temperature`, indexed files looked into; empty when all is well."""
    try:
        sources = parse_path(path, temperature)
    except UserError as error:
        return error.problems
    prefixes = [prefix for source in sources if source.kind == "indexed" for prefix in source.files]
    return [problem for prefix in prefixes for problem in check_indexed(prefix, vocab_size)]


def uncompressed_name(file: str) -> str:
    """A file's name without the extension of its compression."""
    return next((file.removesuffix(end) for end in COMPRESSIONS if file.endswith(end)), file)


def _expand(entry: str) -> tuple[str, tuple[str, ...]] | str:
    """(kind, files) of one entry, or a problem. A name that exists goes before what a glob would match."""
    path = os.path.abspath(os.path.expanduser(entry))
    if _has_index(path):
        return "indexed", (path,)
    if os.path.isfile(path):
        return _classify(entry, [path])
    if os.path.isdir(path):
        return _classify(entry, [file for file in _walk(path) if _known(file)])
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if matches:
        return _classify(entry, matches)
    for present, absent in (INDEXED_EXTENSIONS, INDEXED_EXTENSIONS[::-1]):
        if os.path.isfile(path + present):
            return f"data.path={entry}: {path + absent} is missing beside {present}; restore it or index again"
    return f"data.path={entry}: no such file, directory, match of a glob, or indexed prefix; {_REMEDY}"


def _classify(entry: str, files: list[str]) -> tuple[str, tuple[str, ...]] | str:
    if not files:
        return f"data.path={entry}: no file of a known kind in this directory; {_REMEDY}"
    unknown = [file for file in files if not _known(file)]
    if unknown:
        return f"data.path={entry}: unknown kind of file {unknown[0]} ({len(unknown)} such); {_REMEDY}"
    prefixes = sorted({os.path.splitext(file)[0] for file in files if file.endswith(INDEXED_EXTENSIONS)})
    if not prefixes:
        return "raw", tuple(files)
    if not all(file.endswith(INDEXED_EXTENSIONS) for file in files):
        return f"data.path={entry}: mixes indexed files with text; name them by globs or entries of their own"
    broken = [prefix for prefix in prefixes if not _has_index(prefix)]
    if broken:
        return f"data.path={entry}: {broken[0]} lacks its .bin or its .idx; restore it or index again"
    return "indexed", tuple(prefixes)


def _has_index(prefix: str) -> bool:
    return os.path.isfile(prefix + ".idx") and os.path.isfile(prefix + ".bin")


def _known(file: str) -> bool:
    return file.endswith(RAW_EXTENSIONS + INDEXED_EXTENSIONS)


def _walk(top: str) -> list[str]:
    """Files below a directory, sorted, hidden ones left out."""
    found = []
    for directory, below, files in os.walk(top):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [os.path.join(directory, name) for name in files if not name.startswith(".")]
    return sorted(found)
