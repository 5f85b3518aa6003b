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

_channels: dict[Any, Channel] = {}


def share(group: Any, timeout_seconds: float) -> None:
    """Give a group of ranks on CPUs shared memory, if its ranks can share any. A collective of the group."""
    if group not in _channels and group.size() > 1 and (channel := channel_of(group, timeout_seconds)) is not None:
        _channels[group] = channel


def forget_all() -> None:
    """When the process leaves the job."""
    for channel in _channels.values():
        channel.close()
    _channels.clear()


class _Done:
    """What asynchronous operations return, of one that is done."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _channel(group: Any, tensor: torch.Tensor) -> Channel | None:
    """The group's memory, if this operation may go through it: the same answer on all its ranks, so nothing is asked
    that may differ between them, such as strides."""
    if tensor.dtype not in _DTYPES or threading.current_thread() is not threading.main_thread():
        return None
    return _channels.get(group)


def _outside_autograd(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory: as with torch.distributed, writing to it does not count as a change of what was saved."""
    return tensor.data


def at_once(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The same with `async_op`, and done when it is asked for all the same.

    megatron-core starts operations within layers (tensor parallelism) and on gradients and weights (data parallelism),
    and waits for them later. All ranks of such a group ask for all operations in one order, so none waits for ever.
    gloo would do them in threads of its own, several at a time: with torch 2.13 a rank's heap was then corrupt after
    some 3,000 steps.
    """

    def call(*args, async_op=False, **kwargs):
        collective(*args, **kwargs)
        return _Done() if async_op else None

    return call


@contextmanager
def coalesced(group=None, device=None, async_ops=False) -> Iterator[Any]:
    """Stands for torch's manager of operations that start together: they are done one by one."""
    yield _Done() if async_ops else None


def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
    if group is not None and group.size() == 1:
        return
    channel = _channel(group, tensor) if op in _KINDS else None
    if channel is None:
        dist.all_reduce(tensor, op=op, group=group)
        return
    data = _outside_autograd(tensor)
    dense = data.contiguous()
    channel.all_reduce(dense, _KINDS[op])
    if dense is not data:
        data.copy_(dense)


def all_gather_into_tensor(output, tensor, group=None):
    channel = _channel(group, tensor)
    if channel is None:
        torch_all_gather(output, tensor, group=group)
    else:
        channel.all_gather(_outside_autograd(output), _outside_autograd(tensor).contiguous())


def reduce_scatter_tensor(output, tensor, op=dist.ReduceOp.SUM, group=None):
    channel = _channel(group, tensor) if op == dist.ReduceOp.SUM else None
    if channel is None:
        torch_reduce_scatter(output, tensor, op=op, group=group)
    else:
        channel.reduce_scatter(_outside_autograd(output), _outside_autograd(tensor).contiguous())
