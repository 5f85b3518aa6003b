"""`torch_dist` checkpoints read and written one chunk at a time, without a model.

megatron-core writes a state dict that is in memory; a conversion has none. torch's own writer asks a planner for each
chunk when its turn comes, and its reader for any box of a tensor, so both are used here with planners of ours.
"""

import io
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    save,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _ReaderView

from scale_llm.checkpoint.only_data import DataReader
from scale_llm.checkpoint.work import WriteBehind, made_ahead
from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.io import load_config
from scale_llm.config.run import RunConfig

BESIDE_THE_MODEL = {"critic.": "critic", "optimizer.": "optimizer state"}
"""What names of a run's other tensors begin with -> what they are. A critic's include its optimizer's."""


def is_of_model(key: str) -> bool:
    """Whether a tensor belongs to the model that a checkpoint is of: the policy, where there is a critic too."""
    return not key.startswith(tuple(BESIDE_THE_MODEL))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor to write: `sizes` at `offsets` of the whole `shape`; make gives it when its turn comes."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


class _Planner(DefaultSavePlanner):
    """Plans chunks in place of a state dict."""

    def __init__(self, chunks: Iterable[Chunk], objects: dict[str, Any], progress: Callable[[int], None]):
        super().__init__(flatten_state_dict=False)
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._objects, self._progress = objects, progress
        self._values = made_ahead(self._chunks.values(), lambda chunk: chunk.make())

    def create_local_plan(self) -> SavePlan:
        items = [_item(chunk) for chunk in self._chunks.values()]
        items += [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type is WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[index.fqn], buffer)
            return buffer
        assert index.offset is not None
        chunk, value = next(self._values)  # the writer takes them in the order of the plan
        assert (chunk.key, chunk.offsets) == (index.fqn, tuple(index.offset))
        assert value.dtype is chunk.dtype and value.numel() == math.prod(chunk.sizes), chunk
        self._progress(chunk.bytes)
        return value.reshape(chunk.sizes)


def _item(chunk: Chunk) -> WriteItem:
    offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
    return WriteItem(
        index=MetadataIndex(chunk.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=chunk.dtype),
            size=torch.Size(chunk.shape),
        ),
    )


def write_chunks(
    directory: Path, chunks: Iterable[Chunk], objects: dict[str, Any], progress: Callable[[int], None]
) -> None:
    """Writes this rank's chunks and objects; a collective where a process group is up. Existing files stay.

    objects: name -> what megatron-core keeps beside tensors, saved as it saves them. progress: told of bytes.
    """
    torch.serialization.set_crc32_options(False)  # a fifth of the time; readers do not look at it
    written = directory / f"__{dist.get_rank() if dist.is_initialized() else 0}_0.distcp"
    behind = WriteBehind()

    def step(count: int) -> None:
        behind.flush(written)
        progress(count)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(
                {},
                storage_writer=FileSystemWriter(
                    directory,
                    overwrite=True,
                    per_thread_copy_ahead=0,  # else items are sorted by size where a GPU is seen
                ),
                planner=_Planner(chunks, objects, step),
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:  # torch's wrapper of what happened, a full disk or Ctrl-C
        raise next(iter(error.failures.values()))[0] from error
    finally:
        torch.serialization.set_crc32_options(True)
        behind.close()


class _Into(LoadPlanner):
    """Loads boxes of one tensor into another."""

    def __init__(self, target: torch.Tensor):
        self._target = target

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        raise NotImplementedError

    def create_local_plan(self):
        raise NotImplementedError

    def create_global_plan(self, global_plan):
        raise NotImplementedError

    def finish_plan(self, central_plan):
        raise NotImplementedError

    def load_bytes(self, read_item, value):
        raise NotImplementedError

    def resolve_tensor(self, read_item):
        view = self._target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, offset, length)
        return view

    def commit_tensor(self, read_item, tensor):
        pass


class TorchDistReader:
    """The tensors of one checkpoint directory, `.../iter_0000100`.

    Raises:
        UserError: it is no torch_dist checkpoint, or a file of it is missing or shorter than its index says.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not (self.path / ".metadata").is_file():
            raise UserError(f"{self.path}: holds no .metadata; give a torch_dist checkpoint, or a directory with one")
        self._reader = DataReader(self.path)
        self.metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self._check_files()
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }  # fmt: skip
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def _check_files(self) -> None:
        ends: dict[str, int] = defaultdict(int)
        for place in self.metadata.storage_data.values():
            ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
        problems = []
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.is_file():
                problems.append(f"{file}: this file of the checkpoint is missing")
            elif file.stat().st_size < end:
                problems.append(f"{file}: truncated: {file.stat().st_size} bytes where its index says {end}")
        if problems:
            raise UserError(problems)

    def read(self, key: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """The whole tensor at one index of its leading axes (a layer, a layer and an expert)."""
        entry = self.tensors[key]
        sizes = tuple(entry.size[len(index) :])
        chunks = self._at(key, index)
        if len(chunks) == 1 and tuple(chunks[0].sizes) == (1,) * len(index) + sizes:
            return self._load(MetadataIndex(key, chunks[0].offsets)).view(sizes)
        target = torch.empty((1,) * len(index) + sizes, dtype=entry.properties.dtype)
        box = ChunkStorageMetadata(
            offsets=torch.Size(index + (0,) * len(sizes)), sizes=torch.Size((1,) * len(index) + sizes)
        )
        found = sum(math.prod(chunk.sizes) for chunk in chunks)
        if found < target.numel():
            raise UserError(f"{self.path}: {key} at {index} is incomplete ({found} of {target.numel()} elements)")
        items = create_read_items_for_chunk_list(key, replace(entry, chunks=chunks), [box])
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target.view(sizes)

    def _load(self, index: MetadataIndex) -> torch.Tensor:
        """One chunk as it was saved, without the copy that the reader makes of it."""
        place = self.metadata.storage_data[index]
        with open(self.path / place.relative_path, "rb") as file:
            return torch.load(_ReaderView(file, place.offset, place.length), map_location="cpu", weights_only=True)

    def _at(self, key: str, index: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """The chunks that lie at an index; found once, because some checkpoints have thousands of a tensor."""
        depth = len(index)
        if not depth:
            return self.tensors[key].chunks
        if key not in self._chunks:
            grouped: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self.tensors[key].chunks:
                for place in _places(chunk, depth):
                    grouped[place].append(chunk)
            self._chunks[key] = grouped
        return self._chunks[key].get(index, [])


def _places(chunk: ChunkStorageMetadata, depth: int) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for axis in range(depth):
        start, size = chunk.offsets[axis], chunk.sizes[axis]
        places = [(*place, i) for place in places for i in range(start, start + size)]
    return places


def checkpoint_config(path: Path) -> RunConfig:
    """The configuration that a checkpoint of ours was written under."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: holds no config.yaml, so its model is not known; give a checkpoint of scale_llm")
    return load_config(path)


def find_checkpoint(path: Path | str) -> Path:
    """The iteration directory that a path means: itself, or the one its tracker names."""
    path = Path(path)
    if (path / ".metadata").is_file():
        return path
    try:
        found = latest_checkpoint(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if found is None or not found[1].is_dir():
        raise UserError(f"{path}: no checkpoint there; give a checkpoints directory or one iteration of it")
    return found[1]
