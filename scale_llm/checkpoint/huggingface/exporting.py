"""A `torch_dist` checkpoint as a directory that transformers loads."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from scale_llm.checkpoint.huggingface.merging import Reader, model_reader
from scale_llm.checkpoint.huggingface.model_files import write_model_files
from scale_llm.checkpoint.safetensors_files import Planned, shards_of, write_file, write_index
from scale_llm.checkpoint.staging import output_problems, refuse, staged
from scale_llm.checkpoint.torch_dist import checkpoint_config, find_checkpoint, is_of_model
from scale_llm.checkpoint.work import every_nth, is_first
from scale_llm.config.model import ModelConfig
from scale_llm.models.huggingface import Family, Form, Tensor, export_family
from scale_llm.models.huggingface.forms import to_huggingface

Progress = Callable[[int], None]


def export_huggingface(
    source: Path | str,
    output: Path | str,
    progress: Callable[[int], Progress],
    *,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """A `torch_dist` checkpoint -> a directory that transformers loads. Adapters are merged into their base.

    dtype: None keeps the checkpoint's. architecture: the Hugging Face class; None takes the model's own, else the first
    that has its shape.

    Raises:
        UserError: no checkpoint, tensors missing or of another shape, no class for this model; output not empty.
    """
    source, output = Path(source), Path(output)
    refuse(output_problems(output))
    path = find_checkpoint(source)
    cfg = checkpoint_config(path)
    model = cfg.model
    reader = model_reader(path)
    family = export_family(model, architecture)
    _check_against(reader, family, model)
    planned = list(_planned(reader, family, model, dtype))
    files = shards_of(planned, shard_bytes)
    mine = every_nth(list(files))
    step = progress(sum(tensor.bytes for name in mine for tensor in files[name]))
    with staged(output) as directory:
        for name in mine:
            for tensor in write_file(directory / name, files[name]):
                step(tensor.bytes)
        if is_first():
            write_index(directory, files)
            write_model_files(directory, path, cfg, family, planned[0].dtype)
    return output


def _check_against(reader: Reader, family: Family, model: ModelConfig) -> None:
    problems = []
    tensors = family.tensors_of(model)
    for tensor in tensors:
        entry = reader.tensors.get(tensor.key)
        if entry is None:
            problems.append(f"{reader.path}: {tensor.key} is missing, which {family.model_type} needs")
            continue
        rows = entry.size[0] if tensor.form is Form.vocabulary else 0
        wanted = tensor.leading(model) + tensor.shape(model, rows)
        if tuple(entry.size) != wanted or (rows and rows < (model.vocab_size or 0)):
            problems.append(
                f"{reader.path}: {tensor.key} has shape {tuple(entry.size)} where its config.yaml says {wanted}"
            )
    known = {tensor.key for tensor in tensors}
    problems += [
        f"{reader.path}: {key} has no place in {family.model_type}"
        for key in reader.tensors
        if key not in known and is_of_model(key)
    ]
    refuse(problems)


def _planned(reader: Reader, family: Family, model: ModelConfig, dtype: torch.dtype | None) -> Iterable[Planned]:
    work = [(index, tensor) for tensor in family.tensors_of(model) for index in tensor.indices(model)]
    for index, tensor in sorted(work, key=lambda pair: pair[0]):
        whole = _Shared(partial(reader.read, tensor.key, index), tensor, model)
        kept = dtype or reader.tensors[tensor.key].properties.dtype
        for i, (name, part) in enumerate(zip(tensor.names(index), tensor.parts, strict=True)):
            yield Planned(name, kept, part.sizes(model), partial(whole.part, i))


class _Shared:
    """A Megatron tensor that several parts are cut from: read when the first is asked for, let go after the last."""

    def __init__(self, read: Callable[[], torch.Tensor], tensor: Tensor, model: ModelConfig):
        self._read, self._tensor, self._model = read, tensor, model
        self._parts: list[torch.Tensor] | None = None

    def part(self, i: int) -> torch.Tensor:
        parts = self._parts or to_huggingface(self._tensor, self._read(), self._model)
        self._parts = parts if i < len(parts) - 1 else None
        return parts[i]
