"""A checkpoint of adapters as a directory that peft loads, and the other way."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from scale_llm.checkpoint.bases import base_of
from scale_llm.checkpoint.huggingface.merging import is_adapters
from scale_llm.checkpoint.huggingface.source import read_json
from scale_llm.checkpoint.safetensors_files import Planned, SafetensorsFolder, write_file
from scale_llm.checkpoint.staging import output_problems, refuse, staged
from scale_llm.checkpoint.torch_dist import Chunk, TorchDistReader, checkpoint_config, find_checkpoint, write_chunks
from scale_llm.checkpoint.work import is_first
from scale_llm.checkpoint.writing import copy_tokenizer, write_common
from scale_llm.config.checkpoint_files import is_huggingface, iteration_dir, write_latest
from scale_llm.config.errors import UserError
from scale_llm.config.io import save_config
from scale_llm.config.peft import PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.models.huggingface import export_family, read_model
from scale_llm.models.huggingface.adapters import (
    OURS,
    PROMPT,
    adapter_config,
    chosen,
    places,
    plain_name,
    read_adapter_config,
    target_names,
)
from scale_llm.models.huggingface.tokenizer import tokenizer_of

Progress = Callable[[int], None]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
VIRTUAL = "virtual_tokens.weight"


def is_peft(directory: Path | str) -> bool:
    return (Path(directory) / CONFIG).is_file()


def export_adapters(
    source: Path | str, output: Path | str, progress: Callable[[int], Progress], *, dtype: torch.dtype | None = None
) -> Path:
    """A checkpoint of adapters -> adapter_config.json and adapter_model.safetensors.

    dtype: None keeps the checkpoint's.

    Raises:
        UserError: no adapters there; a family that peft's format cannot hold; output not empty.
    """
    output = Path(output)
    refuse(output_problems(output))
    path = find_checkpoint(source)
    cfg = checkpoint_config(path)
    if cfg.peft.method is PeftMethod.none:
        raise UserError(f"{path}: holds a whole model and no adapters; export it without peft's format")
    family = export_family(cfg.model, cfg.model.architecture)
    planned = list(_planned(TorchDistReader(path), cfg, family, dtype))
    step = progress(sum(tensor.bytes for tensor in planned))
    config = adapter_config(family, cfg.model, cfg.peft, _base_name(path, cfg))
    with staged(output) as directory:
        if is_first():  # they are small
            for tensor in write_file(directory / WEIGHTS, planned):
                step(tensor.bytes)
            (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return output


def _base_name(path: Path, cfg: RunConfig) -> str | None:
    """For base_model_name_or_path; what is not there any more is named as the run knew it."""
    try:
        base: Path | str | None = base_of(path)
    except UserError:
        base = cfg.checkpoint.load
    return None if base is None else str(Path(base).resolve())


def _planned(reader: TorchDistReader, cfg: RunConfig, family, dtype: torch.dtype | None) -> Iterable[Planned]:
    def one(key: str, index: tuple[int, ...], name: str) -> Planned:
        entry = reader.tensors.get(key)
        if entry is None:
            raise UserError(f"{reader.path}: {key} is missing, which its config.yaml says is there")
        return Planned(
            name, dtype or entry.properties.dtype, tuple(entry.size[len(index) :]), partial(reader.read, key, index)
        )

    if cfg.peft.method is PeftMethod.prompt_tuning:
        yield one(VIRTUAL, (), PROMPT)
        return
    for place in chosen(family, cfg.model, cfg.peft):
        for index in place.tensor.indices(cfg.model):
            for what in OURS:
                if what != "magnitude" or cfg.peft.method is PeftMethod.dora:
                    yield one(place.ours(what), index, place.theirs(what, index))


def import_adapters(
    source: Path | str, output: Path | str, progress: Callable[[int], Progress], *, base: Path | str | None = None
) -> Path:
    """A directory of peft -> `output`: a checkpoint of adapters, iteration 0, that goes on training or is merged.

    base: the checkpoint or Hugging Face directory that the adapters belong to; None: what adapter_config.json names.

    Raises:
        UserError: kinds of adapters that are not supported; tensors that are missing, unexpected or of another shape;
            no base; output not empty. Nothing is then written.
    """
    source, output = Path(source), Path(output)
    refuse(output_problems(output))
    config = read_json(source / CONFIG)
    base = Path(base or config.get("base_model_name_or_path") or "")
    cfg = _base_config(base, source)
    cfg.peft = read_adapter_config(config, str(source / CONFIG))
    # One checkpoint, not the newest of a run that may go on
    cfg.checkpoint.load = str((base if is_huggingface(base) else find_checkpoint(base)).resolve())
    folder = SafetensorsFolder(source, single=WEIGHTS)
    chunks = list(_chunks(folder, cfg))
    with staged(output) as directory:
        checkpoint = iteration_dir(directory, 0)
        checkpoint.mkdir(exist_ok=True)
        write_chunks(checkpoint, chunks if is_first() else [], {}, progress(sum(chunk.bytes for chunk in chunks)))
        if is_first():
            write_common(checkpoint, f"import of {source.resolve()}")
            if not is_huggingface(base):
                copy_tokenizer(find_checkpoint(base), checkpoint)
            save_config(cfg, checkpoint)
            write_latest(directory, 0)
    return iteration_dir(output, 0)


def _base_config(base: Path, source: Path) -> RunConfig:
    if is_huggingface(base):
        config = read_json(base / "config.json")
        cfg = RunConfig(run_dir="", model=read_model(config, str(base / "config.json")))
        cfg.tokenizer = tokenizer_of(base, config)
    elif base.is_dir() and not is_adapters(base):
        cfg = checkpoint_config(find_checkpoint(base))
    else:
        raise UserError(
            f"{source / CONFIG}: base_model_name_or_path={base}: no whole model lies there; give --base DIR"
        )
    return cfg


def _chunks(folder: SafetensorsFolder, cfg: RunConfig) -> Iterable[Chunk]:
    names = {plain_name(name): name for name in folder.entries}
    if cfg.peft.method is PeftMethod.prompt_tuning:
        yield _chunk(folder, names[PROMPT], VIRTUAL, (), ())
        return
    model = cfg.model
    found, missing, seen = set(), [], set()
    for place in places(export_family(model, model.architecture), model):
        present = [name for index in place.tensor.indices(model) if (name := place.theirs("into", index)) in names]
        if not present:
            continue
        found.add((place.layer.rpartition(".")[2], place.part))
        for index in place.tensor.indices(model):
            for what in OURS:
                if what == "magnitude" and cfg.peft.method is not PeftMethod.dora:
                    continue
                name = place.theirs(what, index)
                if name not in names:
                    missing.append(f"{folder.directory}: {name} is missing; every layer must have the same adapters")
                    continue
                seen.add(name)
                yield _chunk(folder, names[name], place.ours(what), index, place.tensor.leading(model))
    unexpected = [f"{folder.directory}: {name} is no adapter of this model" for name in names if name not in seen]
    refuse([*missing, *unexpected, *_shapes(folder, cfg, names)])
    cfg.peft.target_modules = target_names(model, found)


def _chunk(folder: SafetensorsFolder, name: str, key: str, index: tuple[int, ...], leading: tuple[int, ...]) -> Chunk:
    entry = folder.entries[name]
    return Chunk(
        key=key,
        shape=(*leading, *entry.shape),
        offsets=(*index, *(0,) * len(entry.shape)),
        sizes=(*(1,) * len(index), *entry.shape),
        dtype=entry.dtype,
        make=partial(folder.read, name),
    )


def _shapes(folder: SafetensorsFolder, cfg: RunConfig, names: dict[str, str]) -> list[str]:
    """Matrices that do not fit the base."""
    problems = []
    for place in places(export_family(cfg.model, cfg.model.architecture), cfg.model):
        rows, columns = place.tensor.parts[place.position].sizes(cfg.model)
        wanted = {"into": (cfg.peft.rank, columns), "out": (rows, cfg.peft.rank), "magnitude": (rows,)}
        for index in place.tensor.indices(cfg.model):
            for what, shape in wanted.items():
                name = names.get(place.theirs(what, index))
                if name is not None and folder.entries[name].shape != shape:
                    problems.append(
                        f"{folder.directory}: {name} has shape {folder.entries[name].shape} where the base and r="
                        f"{cfg.peft.rank} want {shape}"
                    )
    return problems
