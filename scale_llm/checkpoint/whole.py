"""Which checkpoint is whole, and which of a run's own is the newest whole one.

All functions with a group are collectives of it, over gloo, and end alike on every rank.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from scale_llm.checkpoint import checksums
from scale_llm.checkpoint.only_data import load_data
from scale_llm.checkpoint.torch_dist import TorchDistReader
from scale_llm.config.checkpoint_files import is_huggingface, iteration_dir, resumable, saved_iterations, write_latest
from scale_llm.config.errors import UserError
from scale_llm.parallel.first import on_first

SHOWN = 5
"""Damaged files of one checkpoint that are named."""


@dataclass(frozen=True, slots=True)
class Found:
    """remarks: why newer ones were passed over, a line each."""

    iteration: int
    path: Path
    remarks: list[str] = field(default_factory=list)


def newest_whole(directory: Path | str, group: dist.ProcessGroup, *, hashing: bool) -> Found | None:
    """The checkpoint that a run goes on from; None where it has none yet.

    Damaged ones that are newer get another name, iter_0000100.damaged, and the tracker names what was found.

    Raises:
        UserError: there are checkpoints, or a tracker, and none of them is whole. Nothing is touched then.
    """
    directory = Path(directory)
    candidates, wrong = on_first(group, lambda: resumable(directory))
    remarks: list[str] = [wrong] if wrong else []
    damaged: list[Path] = []
    for iteration, path in candidates:
        problems = damage(path, group, hashing=hashing)
        if not problems:
            remarks += on_first(group, lambda: _put_right(directory, iteration, damaged, tracker=bool(remarks)))  # noqa: B023
            return Found(iteration, path, remarks)
        damaged.append(path)
        remarks += problems
    if not remarks:
        return None
    remedy = "put a good copy of one there, or give another run_dir to begin anew"
    raise UserError([*remarks, f"checkpoint.save={directory}: holds no whole checkpoint to go on from; {remedy}"])


def _put_right(directory: Path, iteration: int, damaged: list[Path], *, tracker: bool) -> list[str]:
    """Sets damaged ones aside first: a run that is killed in between finds a tracker without its directory, and looks
    for the newest whole one again."""
    remarks = [f"{path} is kept as {set_aside(path)}" for path in damaged]
    if tracker:
        write_latest(directory, iteration)
    return remarks


def set_aside(path: Path) -> str:
    """Renames a damaged checkpoint to a name that no run reads or overwrites; returns it."""
    count = 1
    while (kept := path.with_name(f"{path.name}.damaged" + (f".{count}" if count > 1 else ""))).exists():
        count += 1
    os.replace(path, kept)
    return kept.name


def refuse_damaged(path: Path, group: dist.ProcessGroup, *, hashing: bool) -> None:
    """For a checkpoint that is not the run's own, and is not touched.

    Raises:
        UserError: it is not whole.
    """
    problems = damage(path, group, hashing=hashing)
    if problems:
        remedy = on_first(group, lambda: _older(path))
        raise UserError([f"{problem}; {remedy}" for problem in problems])


def _older(path: Path) -> str:
    """What to do about a damaged checkpoint of somebody else."""
    number = path.name.removeprefix("iter_")
    older = [i for i in saved_iterations(path.parent) if number.isdecimal() and i < int(number)]
    if not older:
        return "this checkpoint is damaged: copy it again, or name another one"
    return f"this checkpoint is damaged: copy it again, or name an older one: {iteration_dir(path.parent, older[0])}"


def damage(path: Path, group: dist.ProcessGroup, *, hashing: bool) -> list[str]:
    """What is wrong with a checkpoint's files; each rank looks at its share. Without checksums.json the index and the
    lengths that it asks for are looked at. hashing: read the files, else look at lengths alone."""
    if is_huggingface(path):
        return []
    table, problems = on_first(group, lambda: _table(path))
    if table is not None:
        mine = checksums.share(table, dist.get_rank(group), dist.get_world_size(group))
        problems = checksums.problems(path, mine, hashing=hashing)
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, problems, group=group)
    return _few(sorted({problem for part in gathered for problem in part}))


def _few(problems: list[str]) -> list[str]:
    """Of a directory that was half copied not every file."""
    return problems if len(problems) <= SHOWN else [*problems[:SHOWN], f"and {len(problems) - SHOWN} other files"]


def _table(path: Path) -> tuple[checksums.Table | None, list[str]]:
    try:
        table = checksums.read(path)
    except UserError as error:
        return None, error.problems
    return table, [] if table is not None else index_problems(path)


def index_problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint that has no checksums, as far as that can be seen without reading tensors."""
    found = []
    for check in (_check_format, TorchDistReader, lambda path: load_data(path / "common.pt")):
        try:
            check(path)
        except UserError as error:
            found += error.problems
    return found


def _check_format(path: Path) -> None:
    """metadata.json, which says which reader is right."""
    try:
        json.loads((path / "metadata.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'metadata.json'}: cannot be read ({error})") from error
