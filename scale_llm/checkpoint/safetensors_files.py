"""Directories of safetensors files, read and written one tensor at a time.

The format (a length, a JSON header, the bytes) is read here and not by the library, whose reader maps a whole file into
memory and whose writer wants a whole file's tensors at once.
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from scale_llm.checkpoint.work import WriteBehind, made_ahead
from scale_llm.config.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes `start` to `stop` of a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


class SafetensorsFolder:
    """The tensors of a directory.

    Raises:
        UserError: shards that are missing, truncated or no safetensors; tensors in two shards, or in none; all at once.
    """

    def __init__(self, directory: Path | str, single: str = SINGLE):
        """single: name of the file where there are no shards."""
        self.directory, self._single = Path(directory), single
        self.entries: dict[str, Entry] = {}
        problems: list[str] = []
        promised = self._index(problems)
        files = sorted(set(promised.values())) if promised else self._loose(problems)
        for name in files:
            problems += self._read_header(self.directory / name)
        for tensor, name in promised.items():
            if tensor not in self.entries and (self.directory / name).is_file():
                problems.append(f"{self.directory / name}: {tensor} is missing, which {INDEX} says is there")
        if problems:
            raise UserError(problems)

    def _index(self, problems: list[str]) -> dict[str, str]:
        path = self.directory / INDEX
        if (self.directory / self._single).is_file() or not path.is_file():
            return {}
        try:
            return {str(k): str(v) for k, v in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path}: cannot be read ({type(error).__name__}: {error})")
            return {}

    def _loose(self, problems: list[str]) -> list[str]:
        """The files where no index says which: as transformers names them."""
        if (self.directory / self._single).is_file():
            return [self._single]
        found = sorted(path.name for path in self.directory.glob("model*.safetensors"))
        if not found and not problems:
            others = sorted(path.name for path in self.directory.glob("*.bin"))
            remedy = "save the model again with safe_serialization=True" if others else "give a model's directory"
            problems.append(f"{self.directory}: holds no model.safetensors; {remedy}")
        return found

    def _read_header(self, path: Path) -> list[str]:
        if not path.is_file():
            return [f"{path}: this shard is missing; fetch it again"]
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size - 8:
                    return [f"{path}: truncated in its header ({size} bytes); fetch it again"]
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = [
                (name, entry["dtype"], tuple(entry["shape"]), *(8 + length + int(o) for o in entry["data_offsets"]))
                for name, entry in header.items()
            ]
        except (ValueError, struct.error, AttributeError, KeyError, TypeError) as error:
            return [f"{path}: is no safetensors file ({type(error).__name__}: {error})"]
        problems = []
        for name, dtype, shape, start, stop in found:
            if name in self.entries:
                problems.append(f"{path}: {name} is also in {self.entries[name].path.name}")
            if dtype not in DTYPES:
                problems.append(f"{path}: {name} has dtype {dtype}, which is not supported")
                continue
            if start < 8 + length or stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
                problems.append(f"{path}: {name} of {shape} {dtype} has {stop - start} bytes; fetch the file again")
            self.entries[name] = Entry(path, DTYPES[dtype], shape, start, stop)
        end = max((stop for *_, stop in found), default=0)
        if end > size:
            problems.append(f"{path}: truncated: {size} bytes where its header says {end}; fetch it again")
        return problems

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, in memory of its own or into a contiguous one of its shape and dtype."""
        entry = self.entries[name]
        found = torch.empty(entry.shape, dtype=entry.dtype) if into is None else into
        assert found.shape == entry.shape and found.dtype is entry.dtype and found.is_contiguous()
        if not entry.bytes:
            return found
        data = found.reshape(-1).view(torch.uint8)
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            view, filled = memoryview(data.numpy()), 0
            while filled < entry.bytes:
                got = file.readinto(view[filled:])  # type: ignore[attr-defined]  # raw files have it
                if not got:
                    raise UserError(f"{entry.path}: ends within {name}; fetch it again")
                filled += got
        return found


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to write: make gives it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards_of(tensors: Iterable[Planned], shard_bytes: int) -> dict[str, list[Planned]]:
    """Files of at most shard_bytes (a larger tensor has one to itself), named as transformers names them."""
    groups: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_file(path: Path, tensors: list[Planned]) -> Iterator[Planned]:
    """Writes one file, yielding each tensor when it is on disk."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.bytes]
        }  # fmt: skip
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file, contextlib.closing(WriteBehind()) as behind:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor, value in made_ahead(tensors, lambda tensor: tensor.make().to(tensor.dtype).contiguous()):
            assert tuple(value.shape) == tensor.shape, f"{tensor.name}: {tuple(value.shape)}, planned {tensor.shape}"
            view = memoryview(value.reshape(-1).view(torch.uint8).numpy()) if value.numel() else memoryview(b"")
            while len(view):
                view = view[file.write(view) :]
            behind.flush(path)
            yield tensor
        os.fsync(file.fileno())


def write_index(directory: Path, shards: dict[str, list[Planned]]) -> None:
    """The index of several shards."""
    if list(shards) == [SINGLE]:
        return
    places = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.bytes for tensors in shards.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
