"""From `data.path` to files on disk. Imports neither torch nor megatron: `scale-llm --check` runs it."""

import glob
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scale_llm.config.errors import UserError
from scale_llm.data.indexed_check import check_indexed

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One entry of `data.path`."""

    kind: str
    """embedded, raw (text, JSONL, Parquet) or indexed (Megatron's .bin and .idx)."""
    files: tuple[str, ...] = ()
    """Absolute paths, sorted; for indexed sources the prefixes without .bin and .idx; none for embedded."""
    weight: float | None = None
    """Share of the samples, not normalised; None: as much as the source holds."""


def parse_path(path: Any) -> list[Source]:
    """Sources that `data.path` names, in the given order.

    Takes None (the embedded corpus), a string (file, directory, glob or indexed prefix), a list of strings,
    or a list with a weight before every string (`[0.7, a.jsonl, 0.3, b]`). Either all entries have a weight
    or none.

    Raises:
        UserError: with every problem of the whole list.
    """
    if path is None:
        return [Source(kind="embedded")]
    entries = [path] if isinstance(path, str | os.PathLike) else path
    if not isinstance(entries, Sequence) or not entries:
        raise UserError(f"data.path={path!r}: must be a path or a list of paths; {_REMEDY}")
    weighted, problems = _split_weights(list(entries))
    sources = []
    for weight, entry in weighted:
        found = _expand(entry)
        if isinstance(found, str):
            problems.append(found)
        else:
            sources.append(Source(kind=found[0], files=found[1], weight=weight))
    if problems:
        raise UserError(problems)
    return sources


def path_problems(path: Any, vocab_size: int | None = None) -> list[str]:
    """Everything that is wrong with `data.path`, indexed files looked into; empty when all is well."""
    try:
        sources = parse_path(path)
    except UserError as error:
        return error.problems
    prefixes = [prefix for source in sources if source.kind == "indexed" for prefix in source.files]
    return [problem for prefix in prefixes for problem in check_indexed(prefix, vocab_size)]


def uncompressed_name(file: str) -> str:
    """A file's name without the extension of its compression."""
    return next((file.removesuffix(end) for end in COMPRESSIONS if file.endswith(end)), file)


def _as_weight(entry: Any) -> float | None:
    """The number an entry is, or None; a file whose name is a number stays a file."""
    if isinstance(entry, bool) or not isinstance(entry, int | float | str):
        return None
    if isinstance(entry, str) and os.path.exists(entry):
        return None
    try:
        return float(entry)
    except ValueError:
        return None


def _split_weights(entries: list[Any]) -> tuple[list[tuple[float | None, str]], list[str]]:
    """Pairs of (weight or None, path), and problems."""
    weights = [_as_weight(entry) for entry in entries]
    if all(weight is None for weight in weights):
        return [(None, os.fspath(entry)) for entry in entries if _is_path(entry)], _not_paths(entries)
    alternate = len(entries) % 2 == 0 and all(
        (weight is not None) == (place % 2 == 0) for place, weight in enumerate(weights)
    )
    if not alternate:
        return [], [
            f"data.path={entries}: weights and paths do not alternate; give a weight before every path "
            "([0.7, a.jsonl, 0.3, b.jsonl]) or no weight at all"
        ]
    problems = [
        f"data.path={entries}: weight {weight} must be a finite number above 0; remove the entry or raise it"
        for weight in weights[::2]
        if weight is None or not math.isfinite(weight) or weight <= 0
    ]
    problems += _not_paths(entries[1::2])
    pairs = zip(weights[::2], entries[1::2], strict=True)
    return [(weight, os.fspath(entry)) for weight, entry in pairs if _is_path(entry)], problems


def _is_path(entry: Any) -> bool:
    return isinstance(entry, str | os.PathLike) and bool(os.fspath(entry))


def _not_paths(entries: list[Any]) -> list[str]:
    return [f"data.path: {entry!r} is not a path; {_REMEDY}" for entry in entries if not _is_path(entry)]


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
