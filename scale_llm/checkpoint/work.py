"""Dividing a conversion over the ranks of a job, where there is one."""

from typing import Any

import torch.distributed as dist


def is_first() -> bool:
    """Whether this process does what is done once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def my_share(chunks: list[Any]) -> list[Any]:
    """This rank's part of a list whose entries have `bytes`: neighbours together, shares of about equal size."""
    if not dist.is_initialized():
        return chunks
    total, before, mine = sum(chunk.bytes for chunk in chunks), 0, []
    for chunk in chunks:
        if (before + chunk.bytes / 2) * dist.get_world_size() // max(total, 1) == dist.get_rank():
            mine.append(chunk)
        before += chunk.bytes
    return mine


def every_nth(work: list[Any]) -> list[Any]:
    """This rank's part of a list of equals."""
    return work[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else work
