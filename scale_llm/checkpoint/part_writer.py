"""Writes a rank's part of a checkpoint, in a process forked for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from scale_llm.checkpoint.checksums import Table
from scale_llm.checkpoint.snapshot import Release, compact
from scale_llm.checkpoint.summed_file import SummedFile


@dataclass(frozen=True, slots=True)
class Written:
    """results: where everything lies, for the index; table: checksums of this rank's files."""

    results: list[WriteResult]
    table: Table


@dataclass(frozen=True, slots=True)
class Part:
    """items: objects as bytes and tensors on the host, see `snapshot.held`. transforms: of torch's writer."""

    name: str
    items: list[tuple[WriteItem, Any]]
    transforms: Any


def write_part(directory: Path, part: Part, beside: Callable[[Path], None] | None = None) -> Written:
    """Writes the file, and waits until it is on the disk. The part's tensors are lost to this process.

    beside: called with the directory, to write other files there.

    Raises:
        OSError: it could not be written.
    """
    # No reader of torch's looks at the CRC of each tensor, and we take one of the file: it was half of the time
    torch.serialization.set_crc32_options(False)
    release = Release(value for _, value in part.items if isinstance(value, torch.Tensor))
    results = []
    with SummedFile(directory / part.name) as file:
        for item, value in part.items:
            data = compact(value) if isinstance(value, torch.Tensor) else value
            results.append(_write_item(part.transforms, file, data, item, part.name, SerializationFormat.TORCH_SAVE))
            if isinstance(value, torch.Tensor):
                release(value)
    if beside is not None:
        beside(directory)
    return Written(results, {part.name: file.entry})
