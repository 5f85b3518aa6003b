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
PLAN = "plan.json"


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
    held, parts = _held(prefix), Path(prefix + ".parts")
    last = _begun(parts)
    if held is not None and last is not None and all(file in held.files for file in last["files"]):
        shutil.rmtree(parts)  # killed between the last two steps
        last = None
    new = files if held is None else _new_files(prefix, held, wanted, append)
    counts = UnitCounts(**held.counts) if held is not None else UnitCounts()
    if not new:
        return counts, False
    plan = dataclasses.replace(wanted, files=[file for file in wanted.files if file[0] in new])
    is_there = os.path.exists(prefix + ".idx")
    if is_there and held is None and last != dataclasses.asdict(plan):
        _check_foreign(prefix, settings, append)
    begun = _plan(parts, plan, _sequences(prefix))
    counts.add(_index(prefix, plan, settings, parts, workers, on_bytes, begun))
    if not counts.num_documents:
        shutil.rmtree(parts)
        raise UserError(f"--input={files[0]}: holds no text; give files with documents in them")
    stamps = [*(held.files if held else []), *plan.files]
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
    problems += _unlike(sources) if not problems else []
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


def _unlike(sources: list[str]) -> list[str]:
    """Problems of pairs whose tokens mean other things, as far as is known what they were made with."""
    known = [(each, _held(each)) for each in sources]
    made = [(each, held.settings) for each, held in known if held is not None and held.settings is not None]
    return [
        f"--input: {each} was made with another {key} than {made[0][0]}; merge those of one tokenizer"
        for each, settings in made[1:]
        for key in ("tokenizer", "eod_token")
        if settings[key] != made[0][1][key]
    ]


_ELSEWHERE = "give another --output-prefix, or delete its .bin, .idx and .json"


def _held(prefix: str) -> Manifest | None:
    """What PREFIX was made of; None where it is not there, or was made by another tool."""
    path = Path(prefix + ".json")
    if not all(os.path.exists(prefix + end) for end in (".json", ".idx", ".bin")):
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


def _begun(parts: Path) -> dict[str, Any] | None:
    """The plan of the work that a directory holds."""
    path = parts / PLAN
    return json.loads(path.read_text(encoding="utf-8"))["plan"] if path.exists() else None


def _plan(parts: Path, plan: Manifest, sequences: int) -> int:
    """Begins, or finds what an earlier call began; the sequences that the pair had then."""
    path = parts / PLAN
    if path.exists():
        if _begun(parts) == dataclasses.asdict(plan):
            return json.loads(path.read_text(encoding="utf-8"))["sequences"]
        raise UserError(
            f"--output-prefix: {parts} is the unfinished work of other files or settings; finish that with its own "
            "command, or delete the directory"
        )
    write_json(path, {"plan": dataclasses.asdict(plan), "sequences": sequences})
    return sequences


def _index(
    prefix: str, plan: Manifest, settings: IndexSettings, parts: Path, workers: int | None, on_bytes: OnBytes,
    begun: int,
) -> UnitCounts:  # fmt: skip
    """Units, then the pair of what was there at first and of them."""
    from scale_llm.data.indexing import add_units, index_units

    files = [file for file, *_ in plan.files]
    units, counts = index_units(files, settings, parts, workers=workers, on_bytes=on_bytes)
    if changed := [file for file, *rest in plan.files if stamp(file) != [file, *rest]]:
        shutil.rmtree(parts)
        raise UserError([f"--input={file}: has changed while it was read; run again" for file in changed])
    if _sequences(prefix) == begun:  # otherwise the pair was written before a kill
        add_units(prefix, settings.dtype, parts, len(units), keep=begun > 0)
    return counts
