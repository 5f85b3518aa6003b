"""The live bar of a terminal: iterations, loss, tokens per second, utilisation, time left. Elsewhere plain lines."""

import sys


class ProgressBar:
    """Log lines scroll above the bar; without a terminal there is no bar."""

    def __init__(self, name: str, total: int, done: int, wanted: bool):
        self._progress = None
        if not (wanted and sys.stdout.isatty()):
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(name, total=total, completed=done, status="")
        self._progress.start()

    @property
    def live(self) -> bool:
        """Whether there is a bar."""
        return self._progress is not None

    def advance(self, iteration: int, status: str | None = None) -> None:
        """Moves the bar; status: what to show beside it, None for what is there."""
        if self._progress is None:
            return
        self._progress.update(self._task, completed=iteration)
        if status is not None:
            self._progress.update(self._task, status=status)

    def say(self, text: str) -> None:
        if self._progress is None:
            print(text, flush=True)
        else:
            self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
