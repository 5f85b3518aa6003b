"""Element-wise functions as one pass over memory each, by torch.compile.

A function decorated with `fused` is plain torch and stays so until `use_compiler(True)`; from then on its first call
compiles it (about a second; torch keeps the result on disk for later processes) and later calls run one kernel.
Only small functions of tensors are compiled, never a model: what runs is then the same on every layout.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SHAPES_KEPT = 64
"""Shapes that one function is compiled for before torch gives up and runs it uncompiled."""

_on = _any_size = False


def use_compiler(on: bool, *, any_size: bool = False) -> None:
    """Whether fused functions of this process are compiled. Needs a C++ compiler on a CPU, Triton on a GPU.

    any_size: one kernel for all sizes from the first call on, for runs whose shapes vary. Else the first shape has a
    kernel of its own, so that what is computed would depend on which shape a (resumed) process meets first.
    """
    global _on, _any_size
    _on, _any_size = on, any_size


@contextmanager
def uncompiled() -> Iterator[None]:
    """Fused functions run as plain torch while it lasts."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def compiling() -> bool:
    """Whether fused functions are compiled: where not, callers may take another way that suits plain torch."""
    return _on


def fused(function: Callable[..., Any] | None = None, *, dynamic: bool | None = None) -> Callable[..., Any]:
    """Decorator. dynamic: compile once for all sizes; by default for the first, then once for all others."""
    if function is None:
        return functools.partial(fused, dynamic=dynamic)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args):
        nonlocal compiled
        if not _on:
            return function(*args)
        if compiled is None:
            compiled = _compile(function, True if _any_size else dynamic)
        return compiled(*args)

    return call


def _compile(function, dynamic):
    import torch._dynamo.config
    import torch._inductor.config
    import torch.fx.experimental._config

    torch.fx.experimental._config.use_duck_shape = not _any_size  # else sizes that are equal once must always be
    torch._dynamo.config.recompile_limit = _SHAPES_KEPT
    # A pool of compiling processes for each rank would cost more than the few kernels it is for.
    torch._inductor.config.compile_threads = 1
    return torch.compile(function, dynamic=dynamic)


@fused
def add_into(total: torch.Tensor, part: torch.Tensor) -> None:
    """total += part, of a type and a layout in memory that may be others, without a copy of it."""
    total.add_(part)
