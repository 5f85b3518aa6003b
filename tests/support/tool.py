"""A program of tools/ on a forked rank, which saves the start of Python and torch. See support/ranks.py."""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py")


def run(program: str, words: list[str], joined: bool = False) -> list:
    """[exit status, what it prints]. joined: as one of a job's ranks, with the variables that torchrun sets."""
    for name in () if joined else ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    sys.argv = [program, *words]
    sys.path.insert(0, str(Path(program).parent))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(program, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
    return [status, printed.getvalue()]
