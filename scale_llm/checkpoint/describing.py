"""What lies in a checkpoint or a Hugging Face directory, without reading its tensors."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from scale_llm.checkpoint.huggingface.source import read_json
from scale_llm.checkpoint.only_data import load_data
from scale_llm.checkpoint.safetensors_files import SafetensorsFolder
from scale_llm.checkpoint.torch_dist import BESIDE_THE_MODEL, TorchDistReader, find_checkpoint, is_of_model
from scale_llm.config.checkpoint_files import is_huggingface


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One name, or one name in every layer. count: tensors of this name; shape: of each."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Description:
    """kind: `torch_dist` or `huggingface`. lines, parameters, bytes: of the model; beside_bytes: of what else a run has
    saved, such as its optimizer's state."""

    path: Path
    kind: str
    lines: list[TensorLine]
    parameters: int
    bytes: int
    beside_bytes: dict[str, int]
    iteration: int | None
    written_by: str


def describe(path: Path | str) -> Description:
    """Raises UserError where the path is neither kind, or damaged."""
    path = Path(path)
    return _huggingface(path) if is_huggingface(path) else _torch_dist(find_checkpoint(path))


def _huggingface(path: Path) -> Description:
    config, folder = read_json(path / "config.json"), SafetensorsFolder(path)
    grouped: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, entry in folder.entries.items():
        short = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", name))
        key = (short, entry.shape, _name(entry.dtype))
        grouped[key] = grouped.get(key, 0) + 1
    return Description(
        path=path,
        kind="huggingface",
        lines=[TensorLine(name, count, shape, dtype) for (name, shape, dtype), count in grouped.items()],
        parameters=sum(math.prod(entry.shape) for entry in folder.entries.values()),
        bytes=sum(entry.bytes for entry in folder.entries.values()),
        beside_bytes={},
        iteration=None,
        written_by=", ".join(config.get("architectures") or ["?"])
        + f", transformers {config.get('transformers_version', '?')}",
    )


def _torch_dist(path: Path) -> Description:
    reader = TorchDistReader(path)
    lines, parameters, size, beside = [], 0, 0, dict[str, int]()
    for key, entry in reader.tensors.items():
        count, item = math.prod(entry.size), entry.properties.dtype.itemsize
        if not is_of_model(key):
            what = next(what for prefix, what in BESIDE_THE_MODEL.items() if key.startswith(prefix))
            beside[what] = beside.get(what, 0) + count * item
            continue
        leading = 0 if not key.startswith("decoder.layers.") else 2 if ".experts.experts." in key else 1
        shape = tuple(entry.size)
        lines.append(TensorLine(key, math.prod(shape[:leading]), shape[leading:], _name(entry.properties.dtype)))
        parameters, size = parameters + count, size + count * item
    common = _common(path)
    return Description(
        path=path,
        kind="torch_dist",
        lines=lines,
        parameters=parameters,
        bytes=size,
        beside_bytes=beside,
        iteration=common.get("iteration"),
        written_by=common.get("written_by", "not said (Megatron-LM, or scale_llm before 0.1.0)"),
    )


def _common(path: Path) -> dict:
    file = path / "common.pt"
    if not file.is_file():
        return {}
    found = load_data(file)
    return found if isinstance(found, dict) else {}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
