"""Directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from scale_llm.config.errors import UserError


def output_problems(path: Path) -> list[str]:
    """An output directory that something lies in."""
    if path.is_dir() and any(path.iterdir()):
        return [f"{path}: exists and is not empty; give another directory, or remove it"]
    if os.path.ismount(path):
        return [f"{path}: is where a disk is mounted, so nothing can be renamed to it; give a directory below it"]
    if path.exists() and not path.is_dir():
        return [f"{path}: is a file; give a directory"]
    return []


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A directory beside `path` that becomes it when the block ends without an error, and else is removed.

    A collective: every rank enters; the first makes and renames it.
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    try:
        yield partial
        _barrier()
        if first:
            if path.is_dir():
                path.rmdir()  # empty, or it would have been refused
            os.replace(partial, path)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    _barrier()


def refuse(problems: list[str]) -> None:
    """Raises them, if there are any."""
    if problems:
        raise UserError(problems)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
