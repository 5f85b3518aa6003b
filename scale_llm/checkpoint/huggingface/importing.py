"""A Hugging Face model as a `torch_dist` checkpoint."""

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scale_llm import __version__
from scale_llm.checkpoint.huggingface.source import FOLDER, HuggingFaceModel
from scale_llm.checkpoint.staging import output_problems, refuse, staged
from scale_llm.checkpoint.torch_dist import Chunk, write_chunks
from scale_llm.checkpoint.work import is_first, my_share
from scale_llm.config.checkpoint_files import TOKENIZER_FILES, iteration_dir, write_latest
from scale_llm.config.io import save_config
from scale_llm.config.model import ModelConfig
from scale_llm.config.parameters import padded_vocab_size
from scale_llm.config.run import RunConfig
from scale_llm.models.huggingface.tokenizer import tokenizer_of

Progress = Callable[[int], None]


def import_huggingface(source: Path | str, output: Path | str, progress: Callable[[int], Progress]) -> Path:
    """A Hugging Face model -> `output`: iter_0000000 in torch_dist format, tracker, model.yaml and the other files.

    progress: given the bytes of this rank's work, returns what is told of those done. Returns the checkpoint.

    Raises:
        UserError: see HuggingFaceModel; or output exists and is not empty. Nothing is then written.
    """
    source, output = Path(source), Path(output)
    refuse(output_problems(output))
    model = HuggingFaceModel(source)
    with staged(output) as partial_output:
        checkpoint = iteration_dir(partial_output, 0)
        checkpoint.mkdir(exist_ok=True)
        chunks = my_share(list(_chunks(model)))
        step = progress(sum(chunk.bytes for chunk in chunks))
        objects = _extra_states(model.model) if is_first() else {}
        write_chunks(checkpoint, chunks, objects, step)
        if is_first():
            _write_beside(model, partial_output, checkpoint, output)
    return iteration_dir(output, 0)


def _chunks(model: HuggingFaceModel) -> Iterable[Chunk]:
    """Layer after layer, so that shards are read in order."""
    shape, padded = model.model, padded_vocab_size(model.model, 1)
    work = [(index, tensor) for tensor in model.tensors for index in tensor.indices(shape)]
    for index, tensor in sorted(work, key=lambda pair: pair[0]):
        leading, local = tensor.leading(shape), tensor.shape(shape, padded)
        yield Chunk(
            key=tensor.key,
            shape=leading + local,
            offsets=index + (0,) * len(local),
            sizes=(1,) * len(index) + local,
            dtype=model.dtype_of(tensor),
            make=partial(model.megatron, tensor, index, padded),
        )


def _extra_states(model: ModelConfig) -> dict[str, Any]:
    """megatron-core's linear layers look for an (empty) extra state under these names."""
    names = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    layers = range(model.num_layers)
    found = {}
    if model.num_experts is None:
        names += ["mlp.linear_fc1", "mlp.linear_fc2"]
    else:
        for name in ("linear_fc1", "linear_fc2"):
            for layer in layers:
                for expert in range(model.num_experts):
                    place = f"shard_{layer}.{expert}_{model.num_layers}.{model.num_experts}"
                    found[f"decoder.layers.mlp.experts.experts.{name}._extra_state/{place}"] = [None]
    for name in names:
        for layer in layers:
            found[f"decoder.layers.{name}._extra_state/shard_{layer}_{model.num_layers}"] = [None]
    return found


def _write_beside(model: HuggingFaceModel, directory: Path, checkpoint: Path, final: Path) -> None:
    """Everything but the tensors."""
    common = {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "written_by": f"scale_llm {__version__}, import of {model.directory.resolve()}",
    }
    torch.save(common, checkpoint / "common.pt")
    (checkpoint / "metadata.json").write_text(json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1,
    }))  # fmt: skip
    beside = directory / FOLDER
    beside.mkdir(exist_ok=True)
    for name in ("config.json", *TOKENIZER_FILES):
        if (model.directory / name).is_file():
            shutil.copyfile(model.directory / name, beside / name)
    cfg = RunConfig(run_dir="", model=model.model)
    cfg.precision.bf16, cfg.precision.fp16 = model.dtype is torch.bfloat16, model.dtype is torch.float16
    cfg.precision.auto = False
    cfg.tokenizer = tokenizer_of(beside, model.config)
    if cfg.tokenizer.path is not None:
        cfg.tokenizer.path = str((final / FOLDER).resolve())
    save_config(cfg, checkpoint)
    (directory / "model.yaml").write_text(model_yaml(model.model), encoding="utf-8")
    write_latest(directory, 0)


def model_yaml(model: ModelConfig) -> str:
    """An option of the group `model`: what differs from the defaults."""
    from omegaconf import OmegaConf

    whole, plain = (OmegaConf.to_container(OmegaConf.structured(m), enum_to_str=True) for m in (model, ModelConfig()))
    assert isinstance(whole, dict) and isinstance(plain, dict)
    different = {key: value for key, value in whole.items() if value != plain[key]}
    return "defaults: [/schema/model@_here_, _self_]\n" + OmegaConf.to_yaml(OmegaConf.create(different))
