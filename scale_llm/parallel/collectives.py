"""Collectives that ranks wait for, with torch.distributed's names and arguments: through shared memory where a group
has it (see shared_memory.py), else by torch.distributed. Groups have it from `share`, which a mesh calls.

Called where a step has many: by megatron-core's layers, losses, norms and generation.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.parallel.shared_memory import Channel, channel_of

_KINDS = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.MAX: "max", dist.ReduceOp.MIN: "min"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)

# The names of newer versions of torch; the older ones are deprecated there
torch_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
torch_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

_channels: dict[Any, tuple[Channel, bool]] = {}
"""Group -> (its memory, whether operations that need not be waited for are done at once, too)."""


def share(group: Any, timeout_seconds: float, *, at_once: bool = False) -> None:
    """Give a group of ranks on CPUs shared memory, if its ranks can share any. A collective of the group.

    at_once: do asynchronous operations of this group while they are asked for. Only where all its ranks ask for all
    operations, on other groups too, in one order: tensor parallelism.
    """
    if group in _channels:
        known, before = _channels[group]
        _channels[group] = (known, before or at_once)
    elif group.size() > 1 and (channel := channel_of(group, timeout_seconds)) is not None:
        _channels[group] = (channel, at_once)


def forget_all() -> None:
    """When the process leaves the job."""
    for channel, _ in _channels.values():
        channel.close()
    _channels.clear()


class _Done:
    """What asynchronous operations return, of one that is done."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _channel(group: Any, async_op: bool, tensor: torch.Tensor) -> Channel | None:
    """The group's memory, if this operation may go through it: the same answer on all its ranks, so nothing is asked
    that may differ between them, such as strides."""
    found = _channels.get(group)
    if found is None or (async_op and not found[1]) or tensor.dtype not in _DTYPES:
        return None
    if threading.current_thread() is not threading.main_thread():
        return None
    return found[0]


def _outside_autograd(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory: as with torch.distributed, writing to it does not count as a change of what was saved."""
    return tensor.data


def at_once(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The same, done when it is asked for, where the caller would wait for it later.

    For gradients and weights of data parallelism, whose ranks ask for all operations in one order. gloo would do them
    in threads of its own, several at a time: with torch 2.13 a rank's heap was then corrupt after some 3,000 steps.
    """

    def call(*args, async_op=False, **kwargs):
        collective(*args, **kwargs)
        return _Done() if async_op else None

    return call


@contextmanager
def coalesced(group=None, device=None, async_ops=False) -> Iterator[Any]:
    """Stands for torch's manager of operations that start together: they are done one by one."""
    yield _Done() if async_ops else None


def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
    if group is not None and group.size() == 1 and not async_op:
        return None
    channel = _channel(group, async_op, tensor) if op in _KINDS else None
    if channel is None:
        return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)
    data = _outside_autograd(tensor)
    dense = data.contiguous()
    channel.all_reduce(dense, _KINDS[op])
    if dense is not data:
        data.copy_(dense)
    return _Done() if async_op else None


def all_gather_into_tensor(output, tensor, group=None, async_op=False):
    channel = _channel(group, async_op, tensor)
    if channel is None:
        return torch_all_gather(output, tensor, group=group, async_op=async_op)
    channel.all_gather(_outside_autograd(output), _outside_autograd(tensor).contiguous())
    return _Done() if async_op else None


def reduce_scatter_tensor(output, tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
    channel = _channel(group, async_op, tensor) if op == dist.ReduceOp.SUM else None
    if channel is None:
        return torch_reduce_scatter(output, tensor, op=op, group=group, async_op=async_op)
    channel.reduce_scatter(_outside_autograd(output), _outside_autograd(tensor).contiguous())
    return _Done() if async_op else None
