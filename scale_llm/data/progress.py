"""Progress bars on the terminal."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(label: str, total_bytes: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar that the yielded function moves on by a number of bytes; nothing is printed unless `show`."""
    if not show:
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(label, total=total_bytes)
        yield lambda count: progress.advance(task, count)
        progress.update(task, completed=total_bytes)


@contextlib.contextmanager
def count_progress(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """The same of things that are counted."""
    if not show:
        yield lambda count: None
        return
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
