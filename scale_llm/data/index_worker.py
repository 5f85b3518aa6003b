"""A process that indexes units for another: `python -m scale_llm.data.index_worker`.

Lines of JSON. In: settings and directory, then [number, unit] for each unit. Out: {"bytes": n} as they are read, then
{"done": number} or {"problems": [...]}. It ends with its input, and when nobody reads what it says.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from scale_llm.config.errors import UserError
from scale_llm.data.index_units import Span, Unit
from scale_llm.data.index_work import IndexSettings, UnitIndexer


def first_line(settings: IndexSettings, directory: Path) -> str:
    return json.dumps([asdict(settings), str(directory)])


def unit_line(number: int, unit: Unit) -> str:
    return json.dumps([number, unit])


def main() -> None:
    settings, directory = json.loads(sys.stdin.readline())
    indexer = UnitIndexer(IndexSettings(**settings), Path(directory))
    for line in sys.stdin:
        number, unit = json.loads(line)
        try:
            indexer(number, [Span(*span) for span in unit], _Reported())
            _say(done=number)
        except UserError as error:
            _say(problems=error.problems)


class _Reported:
    """Adds up bytes, so that not every line is reported."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, count: int) -> None:
        self.bytes += count
        if self.bytes >= 1 << 20:
            _say(bytes=self.bytes)
            self.bytes = 0


def _say(**message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)
