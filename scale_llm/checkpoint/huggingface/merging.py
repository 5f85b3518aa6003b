"""Checkpoints that hold adapters alone, and the models that they and their bases make together."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from scale_llm.checkpoint.bases import base_of
from scale_llm.checkpoint.huggingface.source import HuggingFaceModel
from scale_llm.checkpoint.staging import output_problems, refuse, staged
from scale_llm.checkpoint.torch_dist import (
    Chunk,
    TorchDistReader,
    checkpoint_config,
    find_checkpoint,
    is_of_model,
    write_chunks,
)
from scale_llm.checkpoint.work import is_first, my_share
from scale_llm.checkpoint.writing import copy_tokenizer, extra_states, write_common
from scale_llm.config.checkpoint_files import is_huggingface, iteration_dir, write_latest
from scale_llm.config.errors import UserError
from scale_llm.config.io import save_config
from scale_llm.config.parameters import padded_vocab_size
from scale_llm.config.peft import PeftConfig, PeftMethod
from scale_llm.config.peft_targets import chosen_parts
from scale_llm.config.run import RunConfig
from scale_llm.models.adapters.merge import PartWeights, merged

Progress = Callable[[int], None]


class Reader(Protocol):
    """Whole tensors of a model by Megatron's names. tensors: name -> an entry with `size` and `properties.dtype`."""

    path: Path
    tensors: dict[str, Any]

    def read(self, key: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """The tensor at one index of its leading axes (a layer, a layer and an expert)."""


class HuggingFaceReader:
    """A Hugging Face model under Megatron's names."""

    def __init__(self, directory: Path):
        self.path = directory
        self._source = HuggingFaceModel(directory)
        model = self._source.model
        self._padded = padded_vocab_size(model, 1)
        self._tables = {tensor.key: tensor for tensor in self._source.tensors}
        self.tensors: dict[str, Any] = {
            key: SimpleNamespace(
                size=torch.Size(tensor.leading(model) + tensor.shape(model, self._padded)),
                properties=SimpleNamespace(dtype=self._source.dtype_of(tensor)),
            )
            for key, tensor in self._tables.items()
        }

    def read(self, key: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        return self._source.megatron(self._tables[key], index, self._padded)


class MergedReader:
    """A base with the adapters of a checkpoint merged into it, one tensor at a time."""

    def __init__(self, path: Path, cfg: RunConfig):
        """path: the checkpoint of adapters; cfg: its configuration."""
        if cfg.peft.method is PeftMethod.prompt_tuning:
            raise UserError(
                f"{path}: holds the vectors of prompt tuning, which no weight of the model can take up; export them "
                "as they are (without --merge)"
            )
        self.path = path
        self._cfg, self._adapters, self._base = cfg, TorchDistReader(path), base_reader(path)
        self._parts = chosen_parts(cfg.model, cfg.peft.target_modules)
        self.tensors = {k: entry for k, entry in self._base.tensors.items() if is_of_model(k)}

    def read(self, key: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        weight = self._base.read(key, index)
        layer, _, name = key.rpartition(".")
        module = layer.rpartition(".")[2]
        if name != "weight" or module not in self._parts:
            return weight
        parts = {part: part_weights(self._adapters, layer, part, index) for part in self._parts[module]}
        return merged(weight, module, parts, self._cfg.model, self._cfg.peft)


def part_weights(reader: Reader, layer: str, part: str, index: tuple[int, ...]) -> PartWeights:
    """The matrices of one part of a layer (`decoder.layers.self_attention.linear_qkv`) at an index."""
    prefix = f"{layer}.adapter.{part}"
    has_magnitude = f"{prefix}.magnitude" in reader.tensors
    return PartWeights(
        reader.read(f"{prefix}.linear_in.weight", index),
        reader.read(f"{prefix}.linear_out.weight", index),
        reader.read(f"{prefix}.magnitude", index) if has_magnitude else None,
    )


def base_reader(path: Path) -> Reader:
    """What lies under the adapters of a checkpoint."""
    base = base_of(path)
    assert base is not None, "they are adapters"
    return model_reader(base)


def model_reader(source: Path | str) -> Reader:
    """The whole model of a checkpoint or a Hugging Face directory; adapters are merged into their base."""
    if is_huggingface(Path(source)):
        return HuggingFaceReader(Path(source))
    path = find_checkpoint(source)
    cfg = checkpoint_config(path)
    return TorchDistReader(path) if cfg.peft.method is PeftMethod.none else MergedReader(path, cfg)


def is_adapters(source: Path | str) -> bool:
    """Whether a checkpoint holds adapters alone."""
    if is_huggingface(Path(source)):
        return False
    path = find_checkpoint(source)
    return (path / "config.yaml").is_file() and checkpoint_config(path).peft.method is not PeftMethod.none


def merge_checkpoint(source: Path | str, output: Path | str, progress: Callable[[int], Progress]) -> Path:
    """A checkpoint of adapters -> `output`: a checkpoint of the whole model, iteration 0.

    Raises:
        UserError: no adapters there, or not their base; output not empty. Nothing is then written.
    """
    output = Path(output)
    refuse(output_problems(output))
    path = find_checkpoint(source)
    cfg = checkpoint_config(path)
    if cfg.peft.method is PeftMethod.none:
        raise UserError(f"{path}: holds a whole model; there is nothing to merge")
    reader = MergedReader(path, cfg)
    with staged(output) as directory:
        checkpoint = iteration_dir(directory, 0)
        checkpoint.mkdir(exist_ok=True)
        chunks = my_share([chunk for key in reader.tensors for chunk in _chunks(reader, key)])
        objects = extra_states(cfg.model) if is_first() else {}
        write_chunks(checkpoint, chunks, objects, progress(sum(chunk.bytes for chunk in chunks)))
        if is_first():
            write_common(checkpoint, f"merge of {path.resolve()}")
            copy_tokenizer(path, checkpoint)
            cfg.peft = PeftConfig()
            cfg.checkpoint.load = None
            save_config(cfg, checkpoint)
            write_latest(directory, 0)
    return iteration_dir(output, 0)


def _chunks(reader: Reader, key: str):
    """One chunk for each index of the leading axes: layers, and experts of a layer."""
    entry = reader.tensors[key]
    depth = (2 if ".experts.experts." in key else 1) if ".layers." in key else 0
    shape, local = tuple(entry.size), tuple(entry.size[depth:])
    for index in torch.cartesian_prod(*map(torch.arange, shape[:depth])).view(-1, depth).tolist() if depth else [[]]:
        yield Chunk(
            key=key,
            shape=shape,
            offsets=(*index, *(0,) * len(local)),
            sizes=(*(1,) * depth, *local),
            dtype=entry.properties.dtype,
            make=partial(reader.read, key, tuple(index)),
        )
