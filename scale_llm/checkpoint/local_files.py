"""Copies of ranks' parts on a node's own disk: their files.

<local_dir>/<run>/rank_00003/iter_0000120/ is what rank 3 keeps of iteration 120: its own part, rank_00003.pt, and those
of ranks on other nodes. Beside each lies rank_00003.json, written last, which says what the part is and has its
checksum: without it there is no copy.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scale_llm.checkpoint import checksums
from scale_llm.checkpoint.snapshot import compact
from scale_llm.checkpoint.summed_file import SummedFile, to_disk
from scale_llm.config.checkpoint_files import iteration_dir, saved_iterations
from scale_llm.config.io import write_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A rank's part of one iteration. run: of a run's life, see `local_copies.run_identity`; layout: everything that
    which rank holds what depends on; after: the newest checkpoint there was, -1: none."""

    run: str
    layout: dict[str, Any]
    after: int
    iteration: int
    rank: int
    bytes: int = 0
    digest: str = ""

    def entry(self) -> dict[str, Any]:
        """As in checksums.json."""
        return {"algorithm": checksums.ALGORITHM, "digest": self.digest, "bytes": self.bytes}


class Shelf:
    """What one rank keeps. All paths are below `directory`."""

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, iteration: int, rank: int) -> Path:
        return iteration_dir(self.directory, iteration) / f"rank_{rank:05d}.pt"

    def write(self, copy: Copy, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> Copy:
        """This rank's part; returns the copy with length and checksum, once it is on the disk.

        Raises:
            OSError: the disk is full, or has failed.
        """
        torch.serialization.set_crc32_options(False)
        with self.receiving(copy) as file:
            torch.save({"tensors": {name: compact(value) for name, value in tensors.items()}, "plain": plain}, file)
        return self.keep(copy, file)

    def receiving(self, copy: Copy) -> SummedFile:
        """A file for the part; `keep` gives it its name."""
        path = self.path(copy.iteration, copy.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        return SummedFile(_partial(path))

    def keep(self, copy: Copy, file: SummedFile) -> Copy:
        """Names a part whose file is closed, and says what it is.

        Raises:
            OSError: it is not what the copy says, where it says that.
        """
        path, found = self.path(copy.iteration, copy.rank), file.entry
        if copy.digest and copy.entry() != found:
            raise OSError(f"{path}: came as {found}, expected {copy.entry()}")
        os.replace(_partial(path), path)
        copy = Copy(**{**asdict(copy), "bytes": found["bytes"], "digest": found["digest"]})
        write_text(path.with_suffix(".json"), json.dumps(asdict(copy)))
        to_disk(path.with_suffix(".json"))
        to_disk(path.parent)
        return copy

    def copies(self) -> Iterator[Copy | str]:
        """All that are there, by what they say of themselves; a line for those that cannot be read. Newest first."""
        for iteration in saved_iterations(self.directory):
            for path in sorted(iteration_dir(self.directory, iteration).glob("rank_*.json")):
                try:
                    copy = Copy(**json.loads(path.read_bytes()))
                    if path.with_suffix(".pt") != self.path(copy.iteration, copy.rank):
                        raise ValueError(f"says that it is of rank {copy.rank} at iteration {copy.iteration}")
                    yield copy
                except (OSError, ValueError, TypeError) as error:
                    yield f"{path}: cannot be read ({error})"

    def problem(self, copy: Copy, *, hashing: bool) -> str | None:
        """What is wrong with the file of a copy."""
        path = self.path(copy.iteration, copy.rank)
        return next(iter(checksums.problems(path.parent, {path.name: copy.entry()}, hashing=hashing)), None)

    def forget_but(self, iteration: int | None) -> None:
        """Removes all others."""
        for path in self.directory.glob("iter_*"):
            if iteration is None or path != iteration_dir(self.directory, iteration):
                shutil.rmtree(path, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
