"""Names for what a rank is doing, as a profiler shows them. Nothing is named, and nothing costs, where none looks on.

`timer` is megatron-core's own interface for this: its schedules and optimizers tell it when the forward pass, the
backward pass, a transfer between pipeline stages or a reduction of gradients begins and ends.
"""

from contextlib import AbstractContextManager, nullcontext

from torch.profiler import record_function

_NOTHING = nullcontext()
_wanted = False
_open: dict[str, list[record_function]] = {}
"""Ranges of megatron-core's that have begun, by name."""


def show_ranges(wanted: bool) -> None:
    """Whether ranges are named from now on. Between steps, so that what has begun also ends."""
    global _wanted
    _wanted = wanted
    _open.clear()


def named(name: str) -> AbstractContextManager:
    """A context that is a range of this name; with torch's emit_nvtx an NVTX range."""
    return record_function(name) if _wanted else _NOTHING


class _Timer:
    """Of one name. Stateless but for the name: megatron-core asks for it anew at the end of a range."""

    __slots__ = ("_name",)

    def __init__(self, name: str):
        self._name = name

    def start(self, barrier: bool = False) -> None:
        """barrier: megatron-core would have ranks wait for each other first, which would change what is seen."""
        shown = record_function(self._name)
        shown.__enter__()
        _open.setdefault(self._name, []).append(shown)

    def stop(self, barrier: bool = False) -> None:
        if began := _open.get(self._name):
            began.pop().__exit__(None, None, None)


class _Silent(_Timer):
    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...


_SILENT = _Silent("")


def timer(name: str, log_level: int = 0) -> _Timer:
    """What megatron-core's configurations take as `timers`."""
    return _Timer(name) if _wanted else _SILENT
