"""Removing old checkpoints and what kills have left of saves, so that a disk does not fill."""

import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scale_llm.config.checkpoint_files import iteration_dir, saved_iterations


@dataclass(frozen=True, slots=True)
class Retention:
    """keep_last: how many of the newest stay; None: all. keep_every: iterations that it divides stay too.

    read: checkpoints that this run reads, which stay.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    read: frozenset[Path] = frozenset()

    def surplus(self, directory: Path, newest: int) -> list[Path]:
        """Checkpoints to remove. Those after `newest`, of a part of the run that was given up, are not counted."""
        if self.keep_last is None:
            return []
        upto = [iteration for iteration in saved_iterations(directory) if iteration <= newest]
        old = [i for i in upto[self.keep_last :] if self.keep_every is None or i % self.keep_every]
        return [path for i in old if (path := iteration_dir(directory, i)).resolve() not in self.read]


def retire(paths: Iterable[Path]) -> list[Path]:
    """Gives them names that no run reads, so that a kill leaves no half checkpoint; returns what is to be removed."""
    retired = []
    for path in paths:
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        retired.append(hidden)
    return retired


def remove_behind(directory: Path) -> threading.Thread:
    """Removes what was retired, now or before a kill, while training goes on."""

    def remove() -> None:
        for path in directory.glob(".iter_*.removed"):
            shutil.rmtree(path, ignore_errors=True)

    thread = threading.Thread(target=remove)
    thread.start()
    return thread


def clear_remains(directory: Path) -> None:
    """Removes what a run that was killed has left here: parts of checkpoints, and what was about to be removed. A
    checkpoint that was being replaced by another of its iteration gets its name back where the other did not come.

    For the one run that saves here, before it does: its former ranks are gone, and their writers with them.
    """
    for former in directory.glob(".iter_*.former"):
        real = former.with_name(former.name.removeprefix(".").removesuffix(".former"))
        if not real.exists():
            os.replace(former, real)
    for kind in ("partial", "removed", "former"):
        for path in directory.glob(f".iter_*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)
