"""Memory that has run out, in words: what was asked for, what holds how much, and which keys make it less."""

import errno
import gc
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
import torch.distributed as dist

from scale_llm.config.errors import TryAgain, UserError
from scale_llm.config.machine import detect
from scale_llm.config.memory import human, remedies
from scale_llm.config.run import RunConfig
from scale_llm.engine.engine import Engine
from scale_llm.engine.held import GRADIENTS, OPTIMIZER, WEIGHTS, held_tensors
from scale_llm.parallel.device import Device

ACTIVATIONS = "activations and other"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER)

SAID = re.compile(
    r"out of memory|can(?:'|no)t allocate memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""By CUDA, NCCL, torch's allocator of the host and NVIDIA's libraries, in what Python sees as a RuntimeError."""

ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)

LAYER = re.compile(r"\.\d+\.")

NAMED, LISTED = 3, 20
"""Largest tensors in the error, and in the log."""

NOTABLE_SHARE = 0.05
"""Of a GPU's memory, lost in pieces that are too small, from which on it is said."""


@dataclass(frozen=True, slots=True)
class Holding:
    """Storages on the device that are alike: those of one name and shape, whatever their layer."""

    size_bytes: int
    kind: str
    text: str
    count: int = 1

    def __str__(self) -> str:
        return self.text if self.count == 1 else f"{self.count} x {self.text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes of the device: of the whole, held by tensors, and kept by torch's allocator in pieces that nobody holds."""

    total: int | None
    held: int
    spare: int = 0


@contextmanager
def memory_explained(cfg: RunConfig, device: Device, log: IO[str] | None) -> Iterator[None]:
    """An error of memory becomes a UserError (TryAgain once the run has learnt something: a restart may get further);
    log: gets the error itself and the longer list."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        engines = _engines()
        holdings, usage = _holdings(engines, device, error.__traceback__), _usage(device)
        if log is not None:
            traceback.print_exception(error, file=log)
            log.write(details(holdings, usage, device))
        kind = TryAgain if any(engine.updates for engine in engines) else UserError
        raise kind(sentence(cfg, str(error), holdings, usage, device)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and SAID.search(str(error)) is not None


def sentence(cfg: RunConfig, said: str, holdings: list[Holding], usage: Usage, device: Device) -> str:
    """The one line for the terminal."""
    whole = f" of {human(usage.total)}" if usage.total is not None else ""
    asked = ASKED.search(said)
    parts = [f"{human(size)} {kind}" for kind, size in by_kind(holdings, usage).items() if size]
    largest = [f"{holding} ({human(holding.size_bytes)})" for holding in holdings[:NAMED]]
    rank = dist.get_rank() if dist.is_initialized() else 0
    words = [
        f"rank {rank} is out of memory{' of its GPU' if device.is_cuda else ''}",
        f": {_asked_bytes(asked[1])} more was asked for" if asked else "",
        f", {human(usage.held)}{whole} is held: {', '.join(parts)}",
        f"; the largest: {', '.join(largest)}" if largest else "",
        f"; {remedies(cfg)}",
    ]
    if usage.total and usage.spare > NOTABLE_SHARE * usage.total:
        words.append(
            f"; {human(usage.spare)} is free in pieces that are too small: set "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment"
        )
    return "".join(words)


def details(holdings: list[Holding], usage: Usage, device: Device) -> str:
    """Lines for the log."""
    rows = [(size, kind) for kind, size in by_kind(holdings, usage).items()]
    rows += [(holding.size_bytes, f"{holding.kind}: {holding}") for holding in holdings[:LISTED]]
    lines = ["memory when it ran out:", *(f"  {human(size):>10}  {text}" for size, text in rows)]
    return "\n".join([*lines, torch.cuda.memory_summary(device.device) if device.is_cuda else "", ""])


def by_kind(holdings: list[Holding], usage: Usage) -> dict[str, int]:
    """Bytes, largest first. What no engine accounts for is activations, and whatever else the process has."""
    sizes = {kind: sum(h.size_bytes for h in holdings if h.kind == kind) for kind in KINDS}
    sizes[ACTIVATIONS] = max(usage.held - sum(sizes.values()), 0)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _asked_bytes(text: str) -> str:
    """The host's allocator says bytes, CUDA's what a person reads."""
    number, _, unit = text.partition(" ")
    return human(float(number)) if unit == "bytes" else text


def _usage(device: Device) -> Usage:
    if device.is_cuda:
        _, total = torch.cuda.mem_get_info(device.device)
        held = torch.cuda.memory_allocated(device.device)
        return Usage(total=total, held=held, spare=torch.cuda.memory_reserved(device.device) - held)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError):  # no Linux
        return Usage(total=None, held=0)
    return Usage(total=detect().memory_bytes, held=pages * 4096)


def _engines() -> list[Engine]:
    """Every one of this process, those of roles too. Found among all objects, as the error may come from where engines
    are still being made."""
    return [found for found in gc.get_objects() if type(found) is Engine and hasattr(found, "_offload")]


def _holdings(engines: list[Engine], device: Device, trace: TracebackType | None) -> list[Holding]:
    """Every storage that Python knows, those that hold most first. What autograd alone holds has no Python object."""
    found: dict[int, tuple[int, str, str]] = {}

    def add(kind: str, name: str, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
        except (NotImplementedError, RuntimeError):  # no memory of its own
            return
        if size and tensor.device.type == device.device.type and key not in found:
            shape = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            found[key] = (size, kind, f"{LAYER.sub('.*.', name)} {shape}")

    for kind, name, tensor in (held for engine in engines for held in held_tensors(engine)):
        add(kind, name, tensor)
    for frame, _ in reversed(list(traceback.walk_tb(trace))):  # the innermost knows it by the best name
        for name, value in frame.f_locals.items():
            if issubclass(type(value), torch.Tensor):
                add(ACTIVATIONS, f"{name} of {frame.f_code.co_name}", value)
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor):
            add(ACTIVATIONS, "a tensor", value)
    alike: dict[tuple[str, str], list[int]] = {}
    for size, kind, text in found.values():
        alike.setdefault((kind, text), []).append(size)
    holdings = [Holding(sum(sizes), kind, text, len(sizes)) for (kind, text), sizes in alike.items()]
    return sorted(holdings, key=lambda holding: -holding.size_bytes)
