"""What ranks do with Hugging Face models: load, answer, train, save. Legend: s sequence, b batch, v vocabulary."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.checkpoint.checkpointer import Checkpointer
from scale_llm.checkpoint.huggingface.merging import is_adapters
from scale_llm.checkpoint.huggingface.source import HuggingFaceModel, read_json
from scale_llm.checkpoint.torch_dist import checkpoint_config, find_checkpoint
from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.io import save_config
from scale_llm.config.model import Head, RopeScaling
from scale_llm.config.optim import DecayStyle, Optimizer
from scale_llm.config.run import RunConfig
from scale_llm.engine import state as engine_state
from scale_llm.engine.engine import Engine
from scale_llm.losses.language_model import language_model_loss
from scale_llm.models.huggingface import Form, read_model
from scale_llm.stages.context import RunContext
from scale_llm.stages.run_state import load_weights
from support.training import join


def _config(directory: str, layout: dict[str, Any], seq_length: int, batch: int) -> RunConfig:
    """The imported model under a layout, FP32."""
    path = Path(directory)
    source = path / "huggingface" if (path / "huggingface").is_dir() else path
    if is_adapters(path):
        written = checkpoint_config(find_checkpoint(path))
        cfg = RunConfig(run_dir="unused", model=written.model, peft=written.peft)
    else:
        cfg = RunConfig(run_dir="unused", model=read_model(read_json(source / "config.json"), str(source)))
    cfg.model.seq_length = seq_length
    cfg.train.micro_batch_size = cfg.train.global_batch_size = batch
    for key, value in layout.items():
        group, field = key.split(".")
        setattr(getattr(cfg, group), field, value)
    return cfg


def _batch(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = tokens[:, :-1].contiguous()
    return {
        "tokens": inputs,
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(inputs.shape),
        "position_ids": torch.arange(inputs.size(1)).expand_as(inputs).contiguous(),
    }


def output(directory: str, data: str, layout: dict[str, Any], mistake: str | None = None) -> torch.Tensor | None:
    """Logits [b, s, v] (or scores [b, s, 1]) for tokens [b, s + 1], on the ranks of the last stage.

    mistake: see MISTAKES.
    """
    tokens = torch.load(data)
    cfg = _config(directory, layout, tokens.size(1) - 1, tokens.size(0))
    if mistake is not None:
        MISTAKES[mistake](cfg)
    device, mesh = join(cfg)
    engine = Engine(cfg, mesh, device, vocab_size=cfg.model.vocab_size, trainable=False)
    load_weights(RunContext(cfg, device, mesh, None), engine, latest_checkpoint(directory)[1])
    seen = []

    def keep(out, batch):
        seen.append(out.detach().clone())
        return out.sum() * 0, torch.tensor(1), {}

    engine.evaluate([_batch(tokens)], keep)
    if not seen:
        return None
    found = seen[0]
    if cfg.model.head is Head.language_model:
        parts = [torch.empty_like(found) for _ in range(mesh.sizes.tp)]
        dist.all_gather(parts, found.contiguous(), group=mesh.groups.tp)
        found = torch.cat(parts, dim=-1)[..., : cfg.model.vocab_size]
    return found.transpose(0, 1)


def _change_tensor(end: str, **change: Any) -> None:
    """Another entry of Llama's table for the tensor whose key ends so; this rank alone has it, and ends soon."""
    from scale_llm.models.huggingface import config
    from scale_llm.models.huggingface.families import llama

    tensors = tuple(
        replace(tensor, **{name: make(tensor) for name, make in change.items()}) if tensor.key.endswith(end) else tensor
        for tensor in llama.FAMILY.tensors
    )
    config.FAMILIES = tuple(
        replace(family, tensors=tensors) if family is llama.FAMILY else family for family in config.FAMILIES
    )


def _plain_qkv(cfg: RunConfig) -> None:
    """Queries, keys and values one above the other, as if every group had no keys of its own."""
    _change_tensor("linear_qkv.weight", form=lambda tensor: Form.gate_up)


def _up_above_gate(cfg: RunConfig) -> None:
    _change_tensor("linear_fc1.weight", parts=lambda tensor: tensor.parts[::-1])


def _swapped_norms(cfg: RunConfig) -> None:
    """Every layer's two norms in each other's place."""
    swapped = {"mlp.linear_fc1.layer_norm_weight": "self_attention.linear_qkv.layer_norm_weight"}
    swapped |= {there: here for here, there in swapped.items()}
    _change_tensor(
        "layer_norm_weight",
        key=lambda tensor: next(tensor.key.replace(a, b) for a, b in swapped.items() if tensor.key.endswith(a)),
    )


def _no_rope_scaling(cfg: RunConfig) -> None:
    cfg.model.rope_scaling = RopeScaling.none


def _other_rope_scaling(cfg: RunConfig) -> None:
    cfg.model.rope_original_max_position_embeddings *= 2


def _padding_first(cfg: RunConfig) -> None:
    """The zeros of the padded vocabulary above the tokens in place of below them."""
    plain = HuggingFaceModel.megatron

    def megatron(self, tensor, index, padded):
        whole = plain(self, tensor, index, padded)
        return whole.roll(1, dims=0) if tensor.form is Form.vocabulary else whole

    HuggingFaceModel.megatron = megatron


MISTAKES = {
    "plain_qkv": _plain_qkv,
    "up_above_gate": _up_above_gate,
    "swapped_norms": _swapped_norms,
    "no_rope_scaling": _no_rope_scaling,
    "other_rope_scaling": _other_rope_scaling,
    "padding_first": _padding_first,
}


def greedy(directory: str, shape: str, prompt: list[int], count: int, layout: dict[str, Any]) -> list[int] | None:
    """The `count` likeliest tokens after a prompt, one whole forward pass a token, on the ranks of the last stage."""
    cfg = _config(shape, layout, len(prompt) + count, 1)
    device, mesh = join(cfg)
    engine = Engine(cfg, mesh, device, vocab_size=cfg.model.vocab_size, trainable=False)
    load_weights(RunContext(cfg, device, mesh, None), engine, latest_checkpoint(directory)[1])
    tokens = list(prompt)
    for _ in range(count):
        chosen: list[int] = []

        last = len(tokens) - 1

        def choose(out, batch, chosen=chosen, last=last):
            parts = [torch.empty_like(out[last]) for _ in range(mesh.sizes.tp)]
            dist.all_gather(parts, out[last].contiguous(), group=mesh.groups.tp)
            chosen.append(int(torch.cat(parts, dim=-1)[0, : cfg.model.vocab_size].argmax()))
            return out.sum() * 0, torch.tensor(1), {}

        whole = tokens + [0] * (cfg.model.seq_length + 1 - len(tokens))  # what comes later is not seen
        engine.evaluate([_batch(torch.tensor([whole]))], choose)
        tokens.append(chosen[0])
    return tokens[len(prompt) :]


def train(directory: str, data: str, layout: dict[str, Any], lr: float, output: str | None = None) -> list[float]:
    """The loss of every step of plain SGD, one batch [b, s + 1] of the file a step. output: where to save adapters."""
    batches = torch.load(data)
    cfg = _config(directory, layout, batches.size(2) - 1, batches.size(1))
    cfg.optim.optimizer, cfg.optim.lr, cfg.optim.lr_decay_style = Optimizer.sgd, lr, DecayStyle.constant
    cfg.optim.sgd_momentum, cfg.optim.weight_decay, cfg.optim.clip_grad, cfg.optim.lr_warmup_iters = 0.0, 0.0, 0.0, 0
    cfg.train.train_iters = len(batches)
    cfg.model.moe_aux_loss_coeff = 0.0
    device, mesh = join(cfg)
    engine = Engine(cfg, mesh, device, vocab_size=cfg.model.vocab_size)
    load_weights(RunContext(cfg, device, mesh, None), engine, latest_checkpoint(directory)[1])
    loss = partial(language_model_loss, tp_group=mesh.groups.tp, vocab_size=cfg.model.vocab_size)
    size = batches.size(1)
    losses = [engine.train_step([_batch(step)], loss, samples=size).metrics["lm loss"] for step in batches]
    if output is not None:
        cfg.checkpoint.load = directory
        state = engine_state.sharded_model_state(engine, engine_state.Weights.adapters)
        Checkpointer(output, mesh.host_group).save(len(batches), state, lambda path: save_config(cfg, path))
    return losses


def resave(directory: str, output: str, layout: dict[str, Any]) -> None:
    """Loads the model under a layout and saves it as a run does."""
    cfg = _config(directory, layout, 32, 1)
    device, mesh = join(cfg)
    engine = Engine(cfg, mesh, device, vocab_size=cfg.model.vocab_size, trainable=False)
    load_weights(RunContext(cfg, device, mesh, None), engine, latest_checkpoint(directory)[1])
    checkpointer = Checkpointer(output, mesh.host_group)
    checkpointer.save(7, engine_state.sharded_model_state(engine), lambda path: save_config(cfg, path))
