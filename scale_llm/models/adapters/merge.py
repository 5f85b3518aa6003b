"""A base's weight and the low-rank matrices beside it as one weight. Whole tensors, of one layer; no megatron-core.

Shapes: r rank; out, in of the whole layer; rows those of one part of it.
"""

import math
from dataclasses import dataclass

import torch

from scale_llm.config.model import ModelConfig
from scale_llm.config.peft import PeftConfig
from scale_llm.config.peft_targets import parts_of


@dataclass(frozen=True, slots=True)
class PartWeights:
    """into: A [r, in]; out: B [rows, r]; magnitude: DoRA's [rows], else None."""

    into: torch.Tensor
    out: torch.Tensor
    magnitude: torch.Tensor | None = None


def scale_of(peft: PeftConfig) -> float:
    """What B A is multiplied by."""
    return peft.alpha / (math.sqrt(peft.rank) if peft.use_rslora else peft.rank)


def merged(
    weight: torch.Tensor, module: str, parts: dict[str, PartWeights], model: ModelConfig, peft: PeftConfig
) -> torch.Tensor:
    """W + alpha/r B A of a layer [out, in], in FP32 and rounded once to the weight's format; with DoRA every row that
    has a magnitude is brought to that length.

    module: linear_qkv, linear_proj, linear_fc1 or linear_fc2. parts: those that have matrices.
    """
    names = list(parts_of(model)[module].values())
    blocks = dict(zip(names, _rows_of_parts(weight, module, model, len(names)), strict=True))
    for name, part in parts.items():
        whole = blocks[name].float() + scale_of(peft) * part.out.float() @ part.into.float()
        if part.magnitude is not None:
            whole *= (part.magnitude.float() / whole.norm(dim=1))[:, None]
        blocks[name] = whole.to(weight.dtype)
    return _joined([blocks[name] for name in names], module, model)


def _rows_of_parts(weight: torch.Tensor, module: str, model: ModelConfig, count: int) -> list[torch.Tensor]:
    """The layer's rows by part: queries, keys and values are interleaved by group, gate lies above up."""
    if module != "linear_qkv":
        return list(weight.chunk(count))
    groups, size = _groups(model)
    heads = model.num_attention_heads // groups
    by_group = weight.view(groups, heads + 2, size, -1)
    return [part.reshape(-1, weight.size(1)) for part in by_group.split([heads, 1, 1], dim=1)]


def _joined(blocks: list[torch.Tensor], module: str, model: ModelConfig) -> torch.Tensor:
    if module != "linear_qkv":
        return torch.cat(blocks)
    groups, size = _groups(model)
    columns = blocks[0].size(1)
    return torch.cat([block.view(groups, -1, size, columns) for block in blocks], dim=1).reshape(-1, columns)


def _groups(model: ModelConfig) -> tuple[int, int]:
    return model.num_query_groups or model.num_attention_heads, model.kv_channels or 0
