"""A `torch_dist` checkpoint as Megatron's older format of fixed shards, for tools that read no other.

OUT/iter_0000100/mp_rank_<tp>[_<pp>][_<ep>]/model_optim_rng.pt, one file a rank, each a dictionary with `model`
(parameter names of that rank, layers counted from its own first), `iteration`, `checkpoint_version` and `args`. Weights
only: optimizer state stays with the checkpoint that any layout loads. Adapters are merged into their base.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from scale_llm.checkpoint.huggingface.merging import Reader, model_reader
from scale_llm.checkpoint.staging import output_problems, refuse, staged
from scale_llm.checkpoint.torch_dist import checkpoint_config, find_checkpoint, is_of_model
from scale_llm.checkpoint.work import every_nth, is_first
from scale_llm.config.checkpoint_files import write_latest
from scale_llm.config.model import Head, ModelConfig
from scale_llm.config.parameters import padded_vocab_size

Progress = Callable[[int], None]

AXES = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
}
"""Ends of names of tensors that tensor parallelism cuts, and where."""

VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of tensor, pipeline and expert parallelism; experts are cut by tensor parallelism too."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        for pp in range(self.pp):
            for ep in range(self.ep):
                for tp in range(self.tp):
                    yield tp, pp, ep

    def directory(self, rank: tuple[int, int, int]) -> str:
        """Megatron's name: pipeline and expert ranks appear where there are several."""
        tp, pp, ep = rank
        name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else "")
        return name + (f"_{ep:03d}" if self.ep > 1 else "")


def reshard(source: Path | str, output: Path | str, layout: Layout, progress: Callable[[int], Progress]) -> Path:
    """Writes the shards of `layout`. progress: given the number of shards of this process, told of each.

    Raises:
        UserError: no checkpoint; a layout that the model does not divide by; output not empty.
    """
    path, output = find_checkpoint(source), Path(output)
    cfg = checkpoint_config(path)
    refuse([*output_problems(output), *_problems(cfg.model, layout)])
    reader = model_reader(path)
    iteration = _iteration(path)
    mine = every_nth(list(layout.ranks()))
    step = progress(len(mine))
    with staged(output) as directory:
        for rank in mine:
            folder = directory / f"iter_{iteration:07d}" / layout.directory(rank)
            folder.mkdir(parents=True)
            shard = {
                "model": dict(_shard(reader, cfg.model, layout, rank)),
                "iteration": iteration,
                "checkpoint_version": 3.0,
                "args": _arguments(cfg.model, layout),
            }
            torch.save(shard, folder / "model_optim_rng.pt")
            step(1)
        if is_first():
            write_latest(directory, iteration)
    return output


def _iteration(path: Path) -> int:
    return int(path.name[5:]) if path.name.startswith("iter_") else 0


def _problems(model: ModelConfig, layout: Layout) -> list[str]:
    groups = model.num_query_groups or model.num_attention_heads
    feed_forward = "ffn_hidden_size" if model.num_experts is None else "moe_ffn_hidden_size"
    wanted = [
        ("tensor-model-parallel-size", layout.tp, "model.num_query_groups", groups),
        ("tensor-model-parallel-size", layout.tp, f"model.{feed_forward}", getattr(model, feed_forward) or 0),
        ("pipeline-model-parallel-size", layout.pp, "model.num_layers", model.num_layers),
        ("expert-model-parallel-size", layout.ep, "model.num_experts", model.num_experts or 1),
    ]
    return [
        f"--{flag} {size}: {key}={whole} is not divisible by it; give a divisor of {whole}"
        for flag, size, key, whole in wanted
        if size < 1 or whole % size
    ]


def _shard(
    reader: Reader, model: ModelConfig, layout: Layout, rank: tuple[int, int, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of one rank."""
    tp, pp, ep = rank
    layers, experts = model.num_layers // layout.pp, (model.num_experts or 0) // layout.ep
    for key in sorted(reader.tensors):
        if not is_of_model(key) or not _on_stage(key, pp, layout.pp):
            continue
        places: list[tuple[int, ...]] = [()]
        if key.startswith("decoder.layers."):
            places = [(layer,) for layer in range(pp * layers, (pp + 1) * layers)]
            if ".experts.experts." in key:
                places = [(*p, expert) for p in places for expert in range(ep * experts, (ep + 1) * experts)]
        for place in places:
            local = tuple(i - first for i, first in zip(place, (pp * layers, ep * experts), strict=False))
            yield local_name(key, local), cut(key, reader.read(key, place), model, layout.tp, tp)
    if layout.pp > 1 and pp == layout.pp - 1 and _tied(model):
        table = "embedding.word_embeddings.weight"  # the last stage has a copy of the table it is tied to
        yield "output_layer.weight", cut("output_layer.weight", reader.read(table), model, layout.tp, tp)


def _tied(model: ModelConfig) -> bool:
    return model.head is Head.language_model and not model.untie_embeddings_and_output_weights


def _on_stage(key: str, pp: int, stages: int) -> bool:
    if key.startswith("embedding."):
        return pp == 0
    if key.startswith(("decoder.final_layernorm.", "output_layer.", "score.")):
        return pp == stages - 1
    return True


def local_name(key: str, place: tuple[int, ...]) -> str:
    """The parameter's name on its rank: `decoder.layers.3.mlp...`, `...experts.local_experts.1.linear_fc1...`."""
    if not place:
        return key
    name = key.replace("decoder.layers.", f"decoder.layers.{place[0]}.", 1)
    return name.replace(".experts.experts.", f".experts.local_experts.{place[1]}.") if len(place) > 1 else name


def cut(key: str, whole: torch.Tensor, model: ModelConfig, size: int, rank: int) -> torch.Tensor:
    """One tensor-parallel rank's part of a tensor, in memory of its own."""
    axis = next((axis for end, axis in AXES.items() if key.endswith(end)), None)
    if key.endswith(VOCABULARY):
        whole = _padded(whole, model, size)
    if axis is None or size == 1:
        return whole
    if model.swiglu and ".linear_fc1." in key:  # a part of the gate above the same part of the up projection
        return torch.cat([half.chunk(size, dim=0)[rank] for half in whole.chunk(2, dim=0)])
    return whole.chunk(size, dim=axis)[rank].clone()


def _padded(table: torch.Tensor, model: ModelConfig, size: int) -> torch.Tensor:
    rows = padded_vocab_size(model, size)
    missing = rows - table.size(0)
    return table[:rows] if missing <= 0 else torch.cat([table, table.new_zeros(missing, *table.shape[1:])])


def _arguments(model: ModelConfig, layout: Layout) -> argparse.Namespace:
    """What Megatron-LM looks for in `args`: the shape and the layout."""
    from omegaconf import OmegaConf

    values = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.structured(model), enum_to_str=True)))
    return argparse.Namespace(
        **values,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
    )
