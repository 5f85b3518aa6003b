"""Indexed files that a user names: made once, appended to, merged; never mixed with those of another configuration.

Beside PREFIX.bin and PREFIX.idx lies PREFIX.json, which says what they were made of; while they are made, PREFIX.parts
holds what is done.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from scale_llm.config.errors import UserError
from scale_llm.data.files import stamp, write_json
from scale_llm.data.index_work import IndexSettings, UnitCounts
from scale_llm.data.indexed_check import check_indexed, read_header
from scale_llm.data.rows import OnBytes
from scale_llm.data.tokenizer_json import file_digest

FORMAT = 1


@dataclasses.dataclass(kw_only=True, slots=True)
class Manifest:
    """PREFIX.json."""

    settings: dict[str, Any] | None
    """None where pairs were merged."""
    files: list[list[Any]]
    """Stamps of the input, in the order of their documents."""
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def of(cls, settings: IndexSettings | None, files: list[str]) -> "Manifest":
        described = None
        if settings is not None:
            described = {**dataclasses.asdict(settings), "tokenizer": file_digest(settings.tokenizer)}
        return cls(settings=described, files=[stamp(file) for file in files])


def index_output(
    prefix: str, files: list[str], settings: IndexSettings, *, append: bool, workers: int | None,
    on_bytes: OnBytes = lambda count: None,
) -> tuple[UnitCounts, bool]:  # fmt: skip
    """Indexes files into PREFIX; files that it holds already are left alone.

    Returns:
        What the pair holds, as far as this tool wrote it, and whether there was anything to do.

    Raises:
        UserError: for input that cannot be read, and where PREFIX holds something else.
    """
    wanted = Manifest.of(settings, files)
    held = _held(prefix)
    new = files if held is None else _new_files(prefix, held, wanted, append)
    counts = UnitCounts(**held.counts) if held is not None else UnitCounts()
    if not new:
        return counts, False
    is_there = os.path.exists(prefix + ".idx")
    if is_there and held is None:
        _check_foreign(prefix, settings, append)
    parts = Path(prefix + ".parts")
    begun = _plan(parts, Manifest.of(settings, new), _sequences(prefix))
    counts.add(_index(prefix, new, settings, parts, workers, on_bytes, begun))
    if not counts.num_documents:
        shutil.rmtree(parts)
        raise UserError(f"--input={files[0]}: holds no text; give files with documents in them")
    stamps = [*(held.files if held else []), *Manifest.of(settings, new).files]
    done = dataclasses.replace(wanted, files=stamps, counts=dataclasses.asdict(counts))
    write_json(Path(prefix + ".json"), dataclasses.asdict(done))
    shutil.rmtree(parts)
    return counts, True


def merge_output(prefix: str, sources: list[str]) -> bool:
    """Joins pairs into PREFIX; False where that is done already.

    Raises:
        UserError: for pairs that are damaged or of another type, and where PREFIX holds something else.
    """
    from scale_llm.data.indexing import join_pairs

    problems = [problem for each in sources for problem in check_indexed(each)]
    if not problems and len(types := {read_header(each)[0]: each for each in sources}) > 1:
        named = ", ".join(f"{kind} ({file})" for kind, file in sorted(types.items()))
        problems = [f"--input: tokens are of more than one type, {named}, so of other tokenizers; merge those of one"]
    if problems:
        raise UserError(problems)
    wanted = Manifest.of(None, [each + end for each in sources for end in (".bin", ".idx")])
    held = _held(prefix)
    if held == wanted:
        return False
    if held is not None or os.path.exists(prefix + ".idx"):
        raise UserError(f"--output-prefix={prefix}: holds something else already; {_ELSEWHERE}")
    join_pairs(prefix, sources)
    write_json(Path(prefix + ".json"), dataclasses.asdict(wanted))
    return True


_ELSEWHERE = "give another --output-prefix, or delete its .bin, .idx and .json"


def _held(prefix: str) -> Manifest | None:
    """What PREFIX was made of; None where it is not there, or was made by another tool."""
    path = Path(prefix + ".json")
    if not (path.exists() and os.path.exists(prefix + ".idx")):
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"--output-prefix={prefix}: its .json is not one of indexed files; {_ELSEWHERE}") from error


def _new_files(prefix: str, held: Manifest, wanted: Manifest, append: bool) -> list[str]:
    """Of the files of `wanted` those that PREFIX does not hold; a UserError where it holds what it should not."""
    if (held.settings, held.format) != (wanted.settings, wanted.format):
        raise UserError(f"--output-prefix={prefix}: made with {_difference(held, wanted)}; {_ELSEWHERE}")
    known = {file: [file, *rest] for file, *rest in held.files}
    changed = [file for file, *rest in wanted.files if file in known and known[file] != [file, *rest]]
    if changed:
        raise UserError(f"--input={changed[0]}: has changed since {prefix} was made of it; {_ELSEWHERE}")
    new = [file for file, *_ in wanted.files if file not in known]
    if not append and (new or len(wanted.files) != len(held.files)):
        raise UserError(f"--output-prefix={prefix}: made of other files; add --append to add yours, {_ELSEWHERE}")
    return new


def _difference(held: Manifest, wanted: Manifest) -> str:
    theirs, ours = held.settings or {}, wanted.settings or {}
    other = [key for key in ours if theirs.get(key) != ours[key]]
    return "another " + ", ".join(other) if theirs and other else "other settings, or merged"


def _check_foreign(prefix: str, settings: IndexSettings, append: bool) -> None:
    """A pair of another tool: added to only on request, and where its tokens could be of this tokenizer."""
    from scale_llm.data.tokenizer import Tokenizer

    if not append:
        raise UserError(f"--output-prefix={prefix}: exists and was not made by this tool; add --append, {_ELSEWHERE}")
    vocab_size = Tokenizer.load(settings.tokenizer, settings.eod_token).vocab_size
    problems = [problem.replace("data.path=", "--output-prefix=", 1) for problem in check_indexed(prefix, vocab_size)]
    if not problems and (dtype := read_header(prefix)[0]) != settings.dtype:
        problems = [f"--output-prefix={prefix}: its tokens are {dtype}, of yours {settings.dtype}; {_ELSEWHERE}"]
    if problems:
        raise UserError(problems)


def _sequences(prefix: str) -> int:
    return read_header(prefix)[1] if os.path.exists(prefix + ".idx") else 0


def _plan(parts: Path, plan: Manifest, sequences: int) -> int:
    """Begins, or finds what an earlier call began; the sequences that the pair had then."""
    path = parts / "plan.json"
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if begun["plan"] == dataclasses.asdict(plan):
            return begun["sequences"]
        raise UserError(
            f"--output-prefix: {parts} is the unfinished work of other files or settings; finish that with its own "
            "command, or delete the directory"
        )
    write_json(path, {"plan": dataclasses.asdict(plan), "sequences": sequences})
    return sequences


def _index(
    prefix: str, files: list[str], settings: IndexSettings, parts: Path, workers: int | None, on_bytes: OnBytes,
    begun: int,
) -> UnitCounts:  # fmt: skip
    """Units, then the pair of what was there at first and of them."""
    from scale_llm.data.indexing import add_units, index_units

    units, counts = index_units(files, settings, parts, workers=workers, on_bytes=on_bytes)
    if _sequences(prefix) == begun:  # otherwise the pair was written before a kill
        add_units(prefix, settings.dtype, parts, len(units), keep=begun > 0)
    return counts
