"""One section of `benchmark.py gpu`, as a process of its own; all that it measures goes to its output, line by line.

python -m benchmarks.gpu_section MODULE:FUNCTION ARGUMENTS

ARGUMENTS: JSON; scale (full or tiny), device, deadline (seconds since 1970 at which it should end), directory (empty,
for its files).
"""

import importlib
import json
import os
import sys

from benchmarks.gpu import as_messages


class Skipped(Exception):
    """What the section needs is not here."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries must not mix with the answers
    module, name = sys.argv[1].split(":")
    try:
        for rows, reason in getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2])):
            print(as_messages(rows, reason), file=answers)
    except Exception as error:
        # By name: as the main module this one is another than the one that sections import
        if type(error).__name__ != "Skipped":
            raise
        print(as_messages([], str(error), skipped=True), file=answers)


if __name__ == "__main__":
    main()
