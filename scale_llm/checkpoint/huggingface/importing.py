"""A Hugging Face model as a `torch_dist` checkpoint."""

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from scale_llm.checkpoint.huggingface.source import FOLDER, HuggingFaceModel
from scale_llm.checkpoint.staging import output_problems, refuse, staged
from scale_llm.checkpoint.torch_dist import Chunk, write_chunks
from scale_llm.checkpoint.work import is_first, my_share
from scale_llm.checkpoint.writing import extra_states, write_common
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
        objects = extra_states(model.model) if is_first() else {}
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


def _write_beside(model: HuggingFaceModel, directory: Path, checkpoint: Path, final: Path) -> None:
    """Everything but the tensors."""
    write_common(checkpoint, f"import of {model.directory.resolve()}")
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
