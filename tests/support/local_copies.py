"""What ranks do in the tests of local copies."""

import contextlib
import io
from pathlib import Path

import torch.distributed as dist

from support.stage import run


def run_and_tell(run_dir: str, log: str, fails: int | None = None) -> list[str]:
    """The run; what the last rank prints goes to `log`. fails: a rank whose disk takes no copies."""
    from scale_llm.checkpoint import local_files

    write = local_files.Shelf.write

    def full(self, *arguments):
        if dist.get_rank() == fails:
            raise OSError("no room")
        return write(self, *arguments)

    local_files.Shelf.write = full
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        problems = run(run_dir)
    if output.getvalue():
        with open(Path(log), "a") as file:
            file.write(output.getvalue())
    return problems
