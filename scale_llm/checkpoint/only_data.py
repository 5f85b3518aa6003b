"""Loading the pickled parts of a checkpoint without running code that somebody put into them.

A pickle names functions and has them called. Here three parts of a torch_dist checkpoint are pickles: `common.pt`, the
index `.metadata`, and objects among the tensors of `*.distcp`. torch reads the first with weights_only=True, but the
index with plain pickle and the objects with weights_only=False. Names that are not on these lists are refused.
"""

import argparse
import contextlib
import io
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader, default_planner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from scale_llm.config.errors import UserError

REMEDY = (
    "nothing of it was run or loaded; take the checkpoint from whom you trust, or convert it to safetensors where "
    "running its code does no harm"
)

OF_THE_INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}  # fmt: skip
"""module -> names: what the writers of torch and megatron-core put into `.metadata`."""


class ForeignCode(pickle.UnpicklingError):
    """The pickle names something that is no data."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in OF_THE_INDEX.get(module, ()):
            raise ForeignCode(f"names {module}.{name}")
        if module == "pathlib._local":  # Python 3.13's name of the same
            module = "pathlib"
        return super().find_class(module, name)


class DataReader(FileSystemReader):
    """torch's reader, its index read once and as data."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises UserError where the index is damaged or holds foreign code."""
        if self._index is None:
            self._index = read_index(Path(self.path))
            if getattr(self._index, "storage_meta", None) is None:
                self._index.storage_meta = StorageMeta()
            self._index.storage_meta.load_id = self.load_id
        return self._index


def read_index(checkpoint: Path) -> Metadata:
    """`.metadata`, which says where tensors lie.

    Raises:
        UserError: it is damaged or holds foreign code.
    """
    path = checkpoint / ".metadata"
    with _explained(path), open(path, "rb") as file:
        found = _IndexUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"a {type(found).__name__} where an index should be")
        return found


def load_data(file: Path | IO[bytes], name: str | None = None) -> Any:
    """What torch.save has written, to the host. name: of the file, for messages.

    Raises:
        UserError: it is damaged or holds foreign code.
    """
    with _explained(name or file), torch.serialization.safe_globals(_harmless()):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's text says how to run the code nevertheless: it is not shown
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            if foreign is None:
                raise ValueError("not what torch.save writes of data") from error
            raise ForeignCode(f"names {foreign[1]}") from error


@contextlib.contextmanager
def _explained(path: Path | IO[bytes] | str | None) -> Iterator[None]:
    try:
        yield
    except ForeignCode as error:
        raise UserError(f"{path}: {error}, which is no data and could run code; {REMEDY}") from error
    except Exception as error:  # noqa: BLE001 - reading a damaged pickle or archive ends in any of them
        text = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {text})") from error


def _harmless() -> list[Any]:
    """What checkpoints of ours and of Megatron-LM hold beside tensors: arguments, and states of generators."""
    rebuild = np.zeros(1).__reduce__()[0]
    names = [(rebuild, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")]
    numbers = [type(np.dtype(kind)) for kind in ("uint8", "uint32", "uint64", "int32", "int64", "float32", "float64")]
    return [argparse.Namespace, SimpleNamespace, io.BytesIO, np.ndarray, np.dtype, *numbers, *names, *_of_megatron()]


def _of_megatron() -> list[Any]:
    """Enumerations and the like in Megatron-LM's arguments; where megatron-core is not imported we do without."""
    module = sys.modules.get("megatron.core.safe_globals")
    return list(module.SAFE_GLOBALS) if module is not None else []


def read_only_data() -> None:
    """Has megatron-core's loader read index and objects as data; once per process, before the first load."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    if strategies._get_filesystem_reader is _reader:
        return

    class Planner(strategies.MCoreLoadPlanner):
        """Objects among tensors are read as data."""

        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            name = read_item.dest_index.fqn
            found = load_data(value, f"{name} in *.distcp")
            if self.flatten_state_dict:
                default_planner.set_element(self.original_state_dict, self.mappings[name], found)
            else:
                self.state_dict[name] = found

    strategies.MCoreLoadPlanner = Planner
    strategies._get_filesystem_reader = _reader


def _reader(checkpoint: str | Path, cache_metadata: bool = False) -> DataReader:
    return DataReader(checkpoint)
