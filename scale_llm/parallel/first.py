"""What one rank finds out for all."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from scale_llm.config.errors import UserError

T = TypeVar("T")


def on_first(group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """What the action gives on rank 0, on every rank. A collective of the group, which all ranks of the job are in.

    Raises:
        UserError: on every rank, where the action raised it or an OSError.
    """
    told: list = [None, None]
    if dist.get_rank() == 0:
        try:
            told = [action(), None]
        except (UserError, OSError) as error:
            told = [None, error.problems if isinstance(error, UserError) else [str(error)]]
    dist.broadcast_object_list(told, src=0, group=group)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]
